"""`champion`: the model that is served, and why it is that one."""

import dagster as dg

from diffusemix_pipeline.orchestration.assets.robustness_report import robustness_report
from diffusemix_pipeline.orchestration.assets.source_images import source_images
from diffusemix_pipeline.orchestration.assets.trained_classifier import trained_classifier
from diffusemix_pipeline.orchestration.resources import RESOURCE_KEYS

PROMOTED = "challenger_is_promoted"


@dg.asset(
    deps=[source_images, trained_classifier, robustness_report],
    group_name="diffusemix",
    kinds={"mlflow"},
    code_version="1",
    pool="gpu",
    required_resource_keys=RESOURCE_KEYS,
    check_specs=[
        dg.AssetCheckSpec(
            PROMOTED,
            asset="champion",
            description="The best new model is the champion now: on val, clean and corrupted, it "
            "is no worse than the one before.",
        )
    ],
    description="The registered model with the alias `champion`. Guarantees: chosen on val; it "
    "changes only for a model that passed the checks and the rule of promotion; the reason is "
    "noted on the challenger, whichever way it went.",
)
def champion(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    from diffusemix_pipeline.orchestration.promotion import promote

    progress = context.resources.progress(context.log)
    made = promote(context.resources.project, context.resources.settings, progress)
    context.log.info(made.decision.reason)
    scores = {"val": made.score, "champion_val": made.champion_score}
    return dg.MaterializeResult(
        data_version=dg.DataVersion(made.champion),
        metadata={
            "reused": made.reused,
            "challenger": f"version {made.version}: {made.model}",
            "champion": f"version {made.champion}",
            "reason": made.decision.reason,
            **{f"{of}_clean": round(score.clean, 4) for of, score in scores.items() if score},
            **{f"{of}_corrupted": round(s.corrupted, 4) for of, s in scores.items() if s},
            **{f"test_{name}": round(value, 4) for name, value in made.test.items()},
            "test_reads": made.test_reads,
        },
        check_results=[
            dg.AssetCheckResult(
                check_name=PROMOTED,
                passed=made.decision.promoted,
                severity=dg.AssetCheckSeverity.WARN,
                description=made.decision.reason,
            )
        ],
    )
