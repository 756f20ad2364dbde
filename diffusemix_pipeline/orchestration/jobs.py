"""The one job: every asset, in order, in one run."""

import dagster as dg

# A machine that dies leaves its run STARTED for ever; this ends it.
_MAX_RUNTIME_SECONDS = 7 * 24 * 3600

MAIN_JOB = "diffusemix"
diffusemix = dg.define_asset_job(
    MAIN_JOB,
    selection=dg.AssetSelection.all(),
    description="From labelled images to a versioned dataset, trained classifiers and a report.",
    tags={"dagster/max_runtime": str(_MAX_RUNTIME_SECONDS)},
)
