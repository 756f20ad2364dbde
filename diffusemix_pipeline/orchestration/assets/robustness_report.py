"""`robustness_report`: what the augmentation did, with intervals, in words and pictures."""

import dagster as dg

from diffusemix_pipeline.orchestration.assets.raw_dataset import raw_dataset
from diffusemix_pipeline.orchestration.assets.source_images import source_images
from diffusemix_pipeline.orchestration.assets.trained_classifier import trained_classifier
from diffusemix_pipeline.orchestration.metadata import picture
from diffusemix_pipeline.orchestration.resources import RESOURCE_KEYS

REPORT_MD = "report_md"
"""The metadata with the report for a pull request."""


@dg.asset(
    deps=[source_images, raw_dataset, trained_classifier],
    group_name="diffusemix",
    kinds={"pytorch", "mlflow"},
    code_version="2",
    pool="gpu",
    required_resource_keys=RESOURCE_KEYS,
    description="Clean, corrupted and FGSM accuracy and calibration of every arm, with 95 % "
    "intervals, at `outputs/report/index.html`. Guarantees: test is read once a model; "
    '"no significant difference" is said in those words.',
)
def robustness_report(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    from diffusemix_pipeline.evaluation.written_report import MARKDOWN
    from diffusemix_pipeline.orchestration.learning import judge

    project, settings = context.resources.project, context.resources.settings
    progress = context.resources.progress(context.log)
    judged = judge(project, settings, progress)
    report = judged.report
    context.log.info(report.headline)
    columns = [name for name in report.summary if not name.endswith(("_low", "_high"))]
    table = report.summary[columns].reset_index().round(4)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(judged.version),
        metadata={
            "headline": report.headline,
            "report": dg.MetadataValue.path(str(report.html)),
            "reused": judged.reused,
            REPORT_MD: dg.MetadataValue.md((report.folder / MARKDOWN).read_text(encoding="utf-8")),
            "table": dg.MetadataValue.md(table.to_markdown(index=False)),
            **{plot.stem: picture(plot.read_bytes(), plot.stem) for plot in report.plots},
        },
    )
