"""The scores of one model as MLflow keeps them: single numbers without intervals.

What does not belong here: comparing arms over seeds (comparison), intervals (statistics).
"""

from collections.abc import Collection

from diffusemix_pipeline.evaluation.calibration import (
    brier_scores,
    expected_calibration_error,
    negative_log_likelihoods,
)
from diffusemix_pipeline.evaluation.evidence import Evidence
from diffusemix_pipeline.evaluation.published_corruptions import counted


def model_metrics(
    evidence: Evidence, base: Evidence | None, left_out: Collection[str]
) -> dict[str, float]:
    """Return a model's scores by name: shares of 1, losses, and errors relative to those of `base`.

    `base` is what vanilla answered at the same training seed, where it was trained; `left_out` are
    the families of corruption that some arm was shown. What was not asked is missing.
    """
    by_epsilon = zip(evidence.epsilons, evidence.fgsm.mean(axis=1), strict=True)
    by_family = zip(evidence.corruptions, evidence.corrupted.mean(axis=(1, 2)), strict=True)
    answers = evidence.probabilities, evidence.labels
    return {
        "test_clean": float(evidence.correct.mean()),
        **_corruption_metrics(evidence, base, left_out),
        "test_brier": float(brier_scores(*answers).mean()),
        "test_nll": float(negative_log_likelihoods(*answers).mean()),
        **_attack_metrics(evidence),
        "test_ece": expected_calibration_error(*answers),
        **{f"test_fgsm_{epsilon:g}_255": float(share) for epsilon, share in by_epsilon},
        **{f"test_{family}": float(share) for family, share in by_family},
        **_published_metrics(evidence),
    }


def _published_metrics(evidence: Evidence) -> dict[str, float]:
    if not evidence.published.size:
        return {}
    return {"test_published": float(evidence.published[counted(evidence.published_sets)].mean())}


def _corruption_metrics(
    evidence: Evidence, base: Evidence | None, left_out: Collection[str]
) -> dict[str, float]:
    """Return accuracy under corruption and mCE to vanilla, of all families and of the unshared."""
    places = list(range(len(evidence.corruptions)))
    groups = {
        "": places,
        "_unshared": [p for p in places if evidence.corruptions[p] not in left_out],
    }
    found = {}
    for name, of_group in groups.items():
        if not of_group or (name and of_group == places):
            continue
        right = evidence.corrupted[of_group].mean(axis=(1, 2))
        found[f"test_corrupted{name}"] = float(right.mean())
        if base and (missed := 1 - base.corrupted[of_group].mean(axis=(1, 2))).all():
            found[f"test_mce_to_vanilla{name}"] = float(((1 - right) / missed).mean())
    return found


def _attack_metrics(evidence: Evidence) -> dict[str, float]:
    """Return the accuracy under the costly attacks, where any image was attacked."""
    attacks = {"pgd_20": evidence.pgd, "autoattack": evidence.autoattack}
    return {
        f"test_{name}_{evidence.attack_epsilon:g}_255": float(right.mean())
        for name, right in attacks.items()
        if right.size
    }
