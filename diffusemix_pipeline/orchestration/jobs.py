"""The one job: every asset, in order, in one run."""

import dagster as dg

MAIN_JOB = "diffusemix"
# A limit to its run time is in dagster.yaml, where a person may raise it; a tag would outrank it.
diffusemix = dg.define_asset_job(
    MAIN_JOB,
    selection=dg.AssetSelection.all(),
    description="From labelled images to a versioned dataset, trained classifiers and a report.",
)
