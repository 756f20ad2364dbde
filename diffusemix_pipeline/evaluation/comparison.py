"""The comparison: evidence of every arm becomes numbers, as `report.json` holds them.

What belongs here: what is compared with what, and by which statistics. What does not: asking
classifiers (evidence), words, plots and the page (report). `docs/report.md` explains every number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from diffusemix_pipeline.evaluation.calibration import (
    binned_gaps,
    brier_scores,
    negative_log_likelihoods,
    reliability_curve,
)
from diffusemix_pipeline.evaluation.evidence import Evidence
from diffusemix_pipeline.evaluation.published_corruptions import counted
from diffusemix_pipeline.evaluation.statistics import (
    SIGNIFICANT,
    Estimate,
    Kind,
    Spread,
    calibration_difference,
    calibration_estimate,
    difference_spread,
    holm,
    mean_estimates,
    ratio_estimate,
    score_spread,
)
from diffusemix_pipeline.own_code import is_own
from diffusemix_pipeline.settings import ARMS, Arm
from diffusemix_pipeline.training.arms import BASELINE, SUBJECTS

_ACCURACIES = (
    "clean", "corrupted", "corrupted_unshared", "overall", "published",
    "fgsm", "fgsm_attack", "pgd", "autoattack",
)  # fmt: skip
_COMPARED = ("clean", "corrupted", "corrupted_unshared", "overall")
"""By what rivals are compared with DiffuseMix."""
_LOSS_OF = {"brier": brier_scores, "nll": negative_log_likelihoods}
_KINDS: dict[str, Kind] = {"accuracies": "score", "losses": "loss"}
_FGSM_SHOWN = 2.0  # of 255: where FGSM tells classifiers apart, neither harmless nor fatal
_CONFUSED_CLASSES = 10

# The families of corruption that an augmentation shows a classifier, more or less, in training.
# Less sharpness is a small blur; to blend with another picture, or a fractal, takes contrast off.
_OF_ARMS: dict[Arm, tuple[str, ...]] = {
    "trivialaugment": ("defocus_blur", "brightness", "contrast"),
    "randaugment": ("defocus_blur", "brightness", "contrast"),
    "mixup": ("contrast",),
    "augmix": ("contrast",),
    "pixmix": ("brightness", "contrast"),
    "diffusemix": ("contrast",),
    "diffusemix_online": ("contrast",),
    "diffusemix+cutmix": ("contrast",),
}
WITH_EDITS: tuple[Arm, ...] = (
    "generated_only", "hybrid_only", "diffusemix", "diffusemix_online", "diffusemix+cutmix",
)  # fmt: skip
# Those that an edit shows: what the bundled editor's teachers do, and other editors are asked for.
_OF_PROMPTS = {
    "autumn": ("brightness", "contrast"),
    "snowy": ("snow", "frost", "fog", "brightness", "contrast"),
    "watercolor art": ("defocus_blur", "brightness", "contrast"),
    "sunset": ("fog", "brightness", "contrast"),
    "rainbow": ("brightness", "contrast"),
    "aurora": ("brightness", "contrast"),
    "mosaic": ("pixelate",),
    "ukiyo-e": ("defocus_blur", "contrast"),
    "a sketch with crayon": ("brightness", "contrast"),
}


def by_arm(evidence: Mapping[tuple[Arm, int], Evidence]) -> dict[Arm, dict[int, Evidence]]:
    """Group by arm, in the order of the settings (vanilla first), and by seed, rising."""
    keys = sorted(evidence, key=lambda key: (in_order(key[0]), key[1]))
    return {
        arm: {seed: evidence[arm, seed] for _, seed in group}
        for arm, group in groupby(keys, key=lambda key: key[0])
    }


def in_order(arm: Arm) -> tuple[int, str]:
    """Return an arm's place among all: in the settings' order, a user's own after them."""
    return (ARMS.index(arm) if arm in ARMS else len(ARMS)), arm


def _shown_epsilon(epsilons: Sequence[float]) -> float:
    """Return the FGSM strength that stands for all: the one nearest to 2/255."""
    return min(epsilons, key=lambda strength: abs(strength - _FGSM_SHOWN))


def shared_families(
    arms: Sequence[Arm], prompts: Sequence[str], families: Sequence[str]
) -> dict[str, Any]:
    """Say which families of corruption some arm was shown in training, and by what.

    `left_out` holds those that leave some of `families` to be compared on: what no arm was shown.
    """
    with_edits = any(arm in WITH_EDITS for arm in arms)
    of_arms = {arm: list(_OF_ARMS[arm]) for arm in arms if arm in _OF_ARMS}
    of_prompts = {p: list(_OF_PROMPTS[p]) for p in prompts if with_edits and p in _OF_PROMPTS}
    shown = {
        family for group in (of_arms, of_prompts) for names in group.values() for family in names
    }
    return {
        "arms": of_arms,
        "prompts": of_prompts,
        "unknown_arms": [arm for arm in arms if is_own(arm)],
        "unknown_prompts": [p for p in prompts if with_edits and p not in _OF_PROMPTS],
        "left_out": [family for family in families if family in shown],
    }


@dataclass(frozen=True)
class _Scores:
    """One arm's scores by name, (S, N) each: of S training seeds and N test images.

    Answers stay bool, of which there are many, until they are averaged.
    """

    accuracies: dict[Any, np.ndarray]
    """Those of _ACCURACIES that were taken, then FGSM by strength, then by (family, severity)."""
    losses: dict[Any, np.ndarray]
    errors: np.ndarray
    """(S, N, F): the share of severities at which an image was got wrong, by family."""
    gaps: np.ndarray
    """(S, N, bins): see `calibration.binned_gaps`."""


class Comparison:
    """All arms' scores, and the statistics of them; arms share test images and seeds."""

    def __init__(
        self,
        arms: Mapping[Arm, Mapping[int, Evidence]],
        left_out: Sequence[str],
        samples: int,
        seed: int,
    ) -> None:
        first = next(iter(next(iter(arms.values())).values()))
        self._samples, self._seed = samples, seed
        self._unshared = [f for f, family in enumerate(first.corruptions) if family not in left_out]
        self._partly = len(self._unshared) < len(first.corruptions) and bool(self._unshared)
        self.epsilon = _shown_epsilon(first.epsilons)
        self._scores = {arm: self._scores_of(list(of.values())) for arm, of in arms.items()}

    def _scores_of(self, evidence: Sequence[Evidence]) -> _Scores:
        first = evidence[0]
        corrupted = np.stack([one.corrupted for one in evidence])  # (S, F, severities, N)
        by_family = corrupted.mean(axis=2)
        attacked = {
            e: np.stack([one.fgsm[i] for one in evidence]) for i, e in enumerate(first.epsilons)
        }
        clean = np.stack([one.correct for one in evidence])
        named = {"clean": clean, "corrupted": by_family.mean(axis=1)}
        unseen = by_family[:, self._unshared].mean(axis=1) if self._unshared else named["corrupted"]
        if self._partly:
            named["corrupted_unshared"] = unseen
        named |= {"overall": (clean + unseen) / 2, "fgsm": attacked[self.epsilon]}
        named["fgsm_attack"] = attacked[first.attack_epsilon]
        sets: dict[Any, np.ndarray] = {}
        if first.published.size:
            sets = {
                ("published", name): np.stack([one.published[row] for one in evidence])
                for row, name in enumerate(first.published_sets)
            }
            places = counted(first.published_sets)
            named["published"] = np.stack([one.published[places].mean(axis=0) for one in evidence])
        named |= {
            name: np.stack([getattr(one, name) for one in evidence])
            for name in ("pgd", "autoattack")
            if getattr(first, name).size
        }
        by_corruption = {
            (family, severity): corrupted[:, row, column]
            for row, family in enumerate(first.corruptions)
            for column, severity in enumerate(first.severities)
        }
        return _Scores(
            accuracies={**named, **attacked, **by_corruption, **sets},
            losses={
                name: np.stack([loss(one.probabilities, one.labels) for one in evidence])
                for name, loss in _LOSS_OF.items()
            },
            errors=1 - by_family.transpose(0, 2, 1),
            gaps=np.stack([binned_gaps(one.probabilities, one.labels) for one in evidence]),
        )

    def estimates(self, arm: Arm) -> dict[Any, Estimate]:
        """Estimate every score of an arm by its name; a measure that was not taken is missing."""
        scores = self._scores[arm]
        found: dict[Any, Estimate] = {}
        for group, kind in _KINDS.items():
            means = {name: s.mean(axis=0) for name, s in getattr(scores, group).items()}
            spreads = {name: score_spread(self._stacked(group, name)) for name in means}
            found |= self._estimated(means, kind, spreads)
        found["ece"] = calibration_estimate(scores.gaps, self._samples, self._seed)
        return found | self._mces_to_vanilla(arm)

    def differences(
        self, arm: Arm, base: Arm, measures: Sequence[Any] = (*_ACCURACIES, *_LOSS_OF, "ece")
    ) -> dict[Any, Estimate]:
        """Estimate an arm's differences to another, image by image, of the named measures."""
        found: dict[Any, Estimate] = {}
        for group, kind in _KINDS.items():
            ours, theirs = (getattr(self._scores[one], group) for one in (arm, base))
            named = [name for name in measures if name in ours]
            changes = {name: ours[name].mean(axis=0) - theirs[name].mean(axis=0) for name in named}
            spreads = {name: difference_spread(self._stacked(group, name)) for name in changes}
            of_changes: Kind = "difference" if kind == "score" else kind
            found |= self._estimated(changes, of_changes, spreads)
        if "ece" not in measures:
            return found
        gaps, base_gaps = self._scores[arm].gaps, self._scores[base].gaps
        found["ece"] = calibration_difference(gaps, base_gaps, self._samples, self._seed)
        return found

    def seed_deviation(self, arm: Arm) -> float | None:
        """Return how far an arm's training seeds lie apart: their standard deviation of `overall`.

        None with one seed.
        """
        means = self._scores[arm].accuracies["overall"].mean(axis=1)
        return float(means.std(ddof=1)) if len(means) > 1 else None

    def _stacked(self, group: str, name: Any) -> np.ndarray:
        """Return a score of all arms, (arms, seeds, N)."""
        return np.stack([getattr(s, group)[name] for s in self._scores.values()])

    def _estimated(
        self, means: Mapping[Any, np.ndarray], kind: Kind, spreads: Mapping[Any, Spread]
    ) -> dict[Any, Estimate]:
        """Estimate scores of as many images together: costly attacks saw fewer than the others."""
        found: dict[Any, Estimate] = {}
        for count in sorted({len(mean) for mean in means.values()}):
            alike = {name: mean for name, mean in means.items() if len(mean) == count}
            found |= mean_estimates(alike, self._samples, self._seed, kind=kind, spreads=spreads)
        return {name: found[name] for name in means}

    def _mces_to_vanilla(self, arm: Arm) -> dict[str, Estimate]:
        """Estimate the mean corruption error, normalised by vanilla; {} where vanilla makes none.

        Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common
        Corruptions and Perturbations (2019): their mCE, with vanilla in AlexNet's place.
        """
        if BASELINE not in self._scores or arm == BASELINE:
            return {}
        groups = {"mce_to_vanilla": list(range(self._scores[arm].errors.shape[2]))}
        if self._partly:
            groups["mce_to_vanilla_unshared"] = self._unshared
        found = {}
        for name, families in groups.items():
            by_arm = {one: s.errors[..., families] for one, s in self._scores.items()}
            base = by_arm[BASELINE].mean(axis=0)
            if (base.sum(axis=0) == 0).any():
                continue
            # Each image's part in the mean of the families' ratios.
            shares = [e @ (len(base) / base.sum(axis=0)) / len(families) for e in by_arm.values()]
            spread = difference_spread(np.stack(shares))
            ours = by_arm[arm].mean(axis=0)
            found[name] = ratio_estimate(ours, base, self._samples, self._seed, spread)
        return found


def arm_documents(comparison: Comparison, arms: Mapping[Arm, Mapping[int, Evidence]]) -> list[Any]:
    """Return what `report.json` says of each arm's measures, and against vanilla."""
    compared = [arm for arm in arms if BASELINE in arms and arm != BASELINE]
    differences = {arm: comparison.differences(arm, BASELINE) for arm in compared}
    adjusted = _adjusted(differences)
    first = next(iter(next(iter(arms.values())).values()))
    attacked = {arm: comparison.differences(arm, BASELINE, first.epsilons) for arm in compared}
    adjusted_attacked = _adjusted(attacked)
    documents = []
    for arm in arms:
        found, deviation = comparison.estimates(arm), comparison.seed_deviation(arm)
        documents.append(
            {
                "arm": arm,
                "seed_deviation": None if deviation is None else rounded(deviation),
                **{
                    name: numbers(found[name]) if name in found else None
                    for name in (*_ACCURACIES, "ece", *_LOSS_OF)
                },
                **{
                    name: numbers(found[name]) if name in found else None
                    for name in ("mce_to_vanilla", "mce_to_vanilla_unshared")
                },
                "difference": _difference(differences[arm], adjusted[arm])
                if arm in differences
                else None,
                "fgsm_by_epsilon": [
                    {
                        "epsilon": strength,
                        **numbers(found[strength]),
                        "difference": _judged(
                            attacked[arm][strength], adjusted_attacked[arm][strength]
                        )
                        if arm in attacked
                        else None,
                    }
                    for strength in first.epsilons
                ],
                "corruptions": [
                    {"family": f, "severity": s, **numbers(found[f, s])}
                    for f in first.corruptions
                    for s in first.severities
                ],
                "published_by_set": [
                    {"set": name, **numbers(found["published", name])}
                    for name in first.published_sets
                ],
            }
        )
    return documents


def rival_documents(comparison: Comparison, arms: Sequence[Arm]) -> list[Any]:
    """Return how each other arm but vanilla differs from each of `SUBJECTS`: accuracies alone."""
    documents = []
    for subject in (arm for arm in SUBJECTS if arm in arms):
        rivals = [arm for arm in arms if arm not in (BASELINE, subject)]
        differences = {arm: comparison.differences(arm, subject, _COMPARED) for arm in rivals}
        adjusted = _adjusted(differences)
        documents += [
            {"arm": arm, "subject": subject, **_difference(differences[arm], adjusted[arm])}
            for arm in rivals
        ]
    return documents


def _adjusted(differences: Mapping[Arm, Mapping[Any, Estimate]]) -> dict[Arm, dict[Any, float]]:
    """Adjust the p-values of each measure for the number of arms."""
    measures = {name for of_arm in differences.values() for name in of_arm}
    by_measure = {
        name: holm({arm: of_arm[name].p for arm, of_arm in differences.items()})
        for name in measures - {"ece"}
    }
    return {arm: {name: of_arm[arm] for name, of_arm in by_measure.items()} for arm in differences}


def _difference(estimates: Mapping[str, Estimate], adjusted: Mapping[str, float]) -> dict[str, Any]:
    return {
        name: {
            **numbers(estimate),
            # The calibration error's intervals are too wide for a p-value: see `statistics`.
            "p": None,
            "significant": False if estimate.holds_zero else None,
        }
        if name == "ece"
        else _judged(estimate, adjusted[name])
        for name, estimate in estimates.items()
    }


def _judged(estimate: Estimate, adjusted: float) -> dict[str, Any]:
    return {**numbers(estimate), "p": rounded(adjusted), "significant": adjusted < SIGNIFICANT}


def numbers(estimate: Estimate) -> dict[str, float]:
    """Return an estimate as JSON."""
    return {name: rounded(getattr(estimate, name)) for name in ("value", "low", "high")}


def rounded(number: float) -> float:
    """Keep what a reader can use: the last bits of a sum differ from machine to machine."""
    return round(float(number), 6) + 0.0  # no -0.0


def reliability_document(of_seed: Mapping[int, Evidence]) -> list[dict[str, Any]]:
    """Bin the answers of all training seeds together."""
    probabilities = np.concatenate([one.probabilities for one in of_seed.values()])
    labels = np.concatenate([one.labels for one in of_seed.values()])
    bins = reliability_curve(probabilities, labels).to_dict("records")
    return [
        {
            "confidence": rounded(bin["confidence"]) if bin["images"] else None,
            "accuracy": rounded(bin["accuracy"]) if bin["images"] else None,
            "images": int(bin["images"]),
        }
        for bin in bins
    ]


def class_documents(
    of_seed: Mapping[int, Evidence], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Return each class's test images and accuracy."""
    labels = next(iter(of_seed.values())).labels
    correct = np.mean([one.correct for one in of_seed.values()], axis=0)
    images = np.bincount(labels, minlength=len(classes))
    right = np.bincount(labels, correct, len(classes))
    return [
        {
            "class": name,
            "images": int(images[label]),
            "accuracy": rounded(right[label] / images[label]) if images[label] else None,
        }
        for label, name in enumerate(classes)
    ]


def confusion_document(
    ours: Mapping[int, Evidence], base: Mapping[int, Evidence], classes: Sequence[str]
) -> dict[str, Any]:
    """Return how answers moved between the classes that changed most.

    `change[i][j]`: of the test images of class i, the share more, or less, that was called j.
    """
    change = _confusion(ours, len(classes)) - _confusion(base, len(classes))
    moved = np.abs(change).sum(axis=1) + np.abs(change).sum(axis=0)
    shown = np.sort(np.argsort(-moved, kind="stable")[:_CONFUSED_CLASSES])
    shown = shown[moved[shown] > 0]
    return {
        "classes": [classes[label] for label in shown],
        "change": [[rounded(value) for value in row] for row in change[np.ix_(shown, shown)]],
    }


def _confusion(of_seed: Mapping[int, Evidence], classes: int) -> np.ndarray:
    """Return float64 (C, C): of the images of a class, the share given each answer."""
    counts = np.zeros((classes, classes))
    for one in of_seed.values():
        np.add.at(counts, (one.labels, one.probabilities.argmax(axis=1)), 1)
    return counts / counts.sum(axis=1, keepdims=True).clip(min=1)


def few_images_document(
    few: Mapping[tuple[Arm, int, int], Evidence],
    arms: Mapping[Arm, Mapping[int, Evidence]],
    train: Mapping[str, int],
    samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return clean accuracy by arm and training images a class, all of them last.

    Each with its difference to vanilla, adjusted for all arms and numbers of images together.
    """
    every = max(train.values())
    scores: dict[tuple[Arm, int], list[np.ndarray]] = {}
    for (arm, number, _), one in few.items():
        scores.setdefault((arm, number), []).append(one.correct)
    for arm in dict.fromkeys(arm for arm, _ in scores):
        scores[arm, every] = [one.correct for one in arms[arm].values()]
    if not scores:
        return []
    stacked = {key: np.stack(of_seeds).astype(np.float64) for key, of_seeds in scores.items()}
    together = {
        number: np.stack([score for key, score in stacked.items() if key[1] == number])
        for _, number in stacked
    }
    means = {key: score.mean(axis=0) for key, score in stacked.items()}
    spreads = {key: score_spread(together[key[1]]) for key in means}
    found = mean_estimates(means, samples, seed, spreads=spreads)
    changes = {
        key: mean - means[BASELINE, key[1]]
        for key, mean in means.items()
        if key[0] != BASELINE and (BASELINE, key[1]) in means
    }
    spreads = {key: difference_spread(together[key[1]]) for key in changes}
    differences = {}
    if changes:
        differences = mean_estimates(changes, samples, seed, kind="difference", spreads=spreads)
    adjusted = holm({key: estimate.p for key, estimate in differences.items()})
    return [
        {
            "arm": arm,
            "per_class": number,
            **numbers(found[arm, number]),
            "difference": _judged(differences[arm, number], adjusted[arm, number])
            if (arm, number) in differences
            else None,
        }
        for arm, number in sorted(found, key=lambda key: (list(arms).index(key[0]), key[1]))
    ]
