"""Promotion: whether a new model takes the champion's place, by a stated rule, on val alone.

What belongs here: the rule, and how a model of other classes or another size is asked. What does
not: where models are registered (tracking), and who asks (orchestration).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffusemix_pipeline.evaluation.evidence import Evidence
from diffusemix_pipeline.training.classifier import Classifier

_NEVER = -1e4  # a logit whose probability is 0; -inf would give NaN where no class is known


class ValScore(NamedTuple):
    """Top-1 accuracies on val, 0 to 1."""

    clean: float
    corrupted: float
    """The mean over corruption families and severities."""

    @property
    def mean(self) -> float:
        """What models are ranked by."""
        return (self.clean + self.corrupted) / 2

    def __str__(self) -> str:
        return f"{100 * self.clean:.1f} % clean and {100 * self.corrupted:.1f} % corrupted"


class Decision(NamedTuple):
    """Whether the challenger is promoted, and why, in words."""

    promoted: bool
    reason: str


def score(evidence: Evidence) -> ValScore:
    """Return what a model reached on the images that it was asked about."""
    return ValScore(float(evidence.correct.mean()), float(evidence.corrupted.mean()))


def decide(challenger: ValScore, champion: ValScore | None, tolerance: float) -> Decision:
    """Promote where the mean of clean and corrupted is no lower, and neither falls far.

    "Far" is more than `tolerance`, in shares of 1. Both were asked about the same val images, those
    of the challenger's data. Where there is no champion, whatever passed the checks becomes it.
    """
    if champion is None:
        return Decision(True, f"There was no champion. Val: {challenger}.")
    compared = f"Val: {challenger}; the champion has {champion}."
    fallen = [
        name
        for name, new, old in (
            ("clean", challenger.clean, champion.clean),
            ("corrupted", challenger.corrupted, champion.corrupted),
        )
        if new < old - tolerance
    ]
    if fallen:
        far = f"{100 * tolerance:g} point{'s' * (tolerance != 0.01)}"
        are = "accuracy is" if len(fallen) == 1 else "accuracy are each"
        return Decision(
            False, f"Its {' and '.join(fallen)} {are} more than {far} lower. {compared}"
        )
    if challenger.mean < champion.mean:
        return Decision(False, f"The mean of its two accuracies is lower. {compared}")
    return Decision(True, f"The mean of its two accuracies is no lower. {compared}")


def best_by_chance(images: Iterable[int]) -> float:
    """Return the accuracy that naming the most frequent class reaches but once in a thousand.

    `images` are the numbers of val images a class, of which such images are drawn. So few images
    that luck may get nearly all of them right ask for less: halfway from that class's share to 1.
    """
    counts = list(images)
    total, share = sum(counts), max(counts) / sum(counts)
    by_luck = float(stats.binom.ppf(0.999, total, share) + 1) / total
    return min(by_luck, (share + 1) / 2)


class InClasses(nn.Module):
    """A classifier that answers in other classes, and takes images of another side.

    Takes float (N, 3, S, S) in [0, 1], of any S, and gives logits (N, len(classes)). A class that
    the classifier does not know is never its answer; one that is not asked for is not, either.
    """

    def __init__(self, classifier: Classifier, classes: Sequence[str]) -> None:
        super().__init__()
        self.model, self.size = classifier.model, classifier.size
        known = [name for name in classes if name in classifier.classes]
        self.theirs = [classifier.classes.index(name) for name in known]
        self.ours = [classes.index(name) for name in known]
        self.count = len(classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.size:
            side = (self.size, self.size)
            images = interpolate(images, side, mode="bilinear", antialias=True)
        logits = self.model(images)
        answers = torch.full((len(images), self.count), _NEVER, device=logits.device)
        answers[:, self.ours] = logits[:, self.theirs].float()
        return answers
