"""Statistics: how far a number could have come out otherwise with other images, or other seeds.

Test images are drawn anew by the percentile bootstrap, many times. One call draws the same images
for all that it compares, so a difference between two arms is paired: what makes an image hard for
both does not widen its interval.

A bootstrap alone is too sure of itself where few images tell: 4 answers mended and none broken
would be significant, and all right would be certain. So a few made-up images join those that are
drawn from, one or two each way, as in the intervals of Agresti and Coull (1998) for a proportion
and of Agresti and Min (2005) for a paired difference; with many images they change nothing.

Training seeds are drawn anew as well where there are several. Of three, only ten different samples
can be drawn, and these vary too little: so the mean over seeds is moved by draws of Student's t
instead, scaled by the standard error that an analysis of variance gives (`difference_spread`).
With one training seed, an interval covers the sampling of test images only.

A p-value is not counted from the resamples: after Holm's correction for eleven arms it has to be
below 0.0045, where so few resamples lie that another draw of them would change the verdict. It is
of what resamples come to with ever more of them: a normal draw by the standard error of images, and
one of Student's t by that of seeds, added up.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from scipy.special import fdtrc, ndtr, stdtr, stdtrit

CONFIDENCE = 0.95
SIGNIFICANT = 0.05  # a p-value below it, adjusted for the number of arms
Kind = Literal["score", "difference", "loss"]
# The scores of the made-up images; a loss has no bounds that they could be at.
_EACH_WAY: dict[Kind, tuple[float, ...]] = {
    "score": (0.0, 0.0, 1.0, 1.0),
    "difference": (-1.0, 1.0),
    "loss": (),
}
_BOUNDS: dict[Kind, tuple[float, float]] = {
    "score": (0, 1),
    "difference": (-1, 1),
    "loss": (-np.inf, np.inf),
}
Name = TypeVar("Name", bound=Hashable)
_DRAWS_AT_ONCE = 4_000_000  # images drawn in one piece: what bounds the memory


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, from `low` to `high`."""

    value: float
    low: float
    high: float
    p: float = float("nan")
    """Two-sided p-value of the value being zero, for a difference."""

    @property
    def holds_zero(self) -> bool:
        """Whether 0 lies in the interval: no significant difference, for a difference."""
        return self.low <= 0 <= self.high


class Spread(NamedTuple):
    """How far a mean over the training seeds would come out otherwise with other seeds."""

    error: float
    """Standard error of the mean."""
    freedom: int
    """Degrees of freedom behind it; with none, nothing is known and nothing is added."""
    of_image: float = 0.0
    """The part in the variance of images' scores that is only seeds' answering them otherwise: it
    is in the error already, so the resampling of images leaves it out."""


def score_spread(scores: np.ndarray) -> Spread:
    """Return the spread of any arm's mean, from `scores` (arms, seeds, images).

    The variance between seeds is taken to be one for all arms, and pooled: three seeds alone say
    little of it.
    """
    arms, seeds, _ = scores.shape
    left = scores - scores.mean(axis=1, keepdims=True)
    return _spread(left, arms * (seeds - 1), 1 / seeds)


def difference_spread(scores: np.ndarray) -> Spread:
    """Return the spread of the difference of any two arms' means, from (arms, seeds, images).

    What a seed does to all arms alike is taken off: arms of one seed start from the same weights.
    The rest is the residual of a two-way analysis of variance.
    """
    arms, seeds, _ = scores.shape
    of_arm, of_seed = scores.mean(axis=1, keepdims=True), scores.mean(axis=0, keepdims=True)
    left = scores - of_arm - of_seed + of_arm.mean(axis=0, keepdims=True)
    return _spread(left, (arms - 1) * (seeds - 1), 2 / seeds)


def _spread(residuals: np.ndarray, freedom: int, share: float) -> Spread:
    """Return what `share` of the residuals' variance, (arms, seeds, images), says of a mean."""
    if not freedom:
        return Spread(0.0, 0)
    of_means = float((residuals.mean(axis=2) ** 2).sum() / freedom)
    of_images = float((residuals**2).mean(axis=2).sum() / freedom)
    return Spread(float(np.sqrt(of_means * share)), freedom, (of_images - of_means) * share)


def uneven_seeds(deviations: Mapping[Name, float], seeds: int) -> dict[Name, float]:
    """Find the arms whose seeds lie further apart than the others' and than chance explains.

    `deviations` are each arm's standard deviation over its training seeds, two or more. Of an arm
    that is found, the standard deviation of all others together is returned. By the F test of its
    variance against theirs, at 0.05 over the number of arms (Bonferroni).
    """
    uneven = {}
    for arm, deviation in deviations.items():
        others = [of for other, of in deviations.items() if other != arm]
        if not deviation or not others:
            continue
        together = float(np.sqrt(np.mean(np.square(others))))
        ratio = (deviation / together) ** 2 if together else np.inf
        p = fdtrc(seeds - 1, len(others) * (seeds - 1), ratio)
        if p * len(deviations) < SIGNIFICANT:
            uneven[arm] = together
    return uneven


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Adjust p-values so that of all arms, in 1 of 20 reports any is below 0.05 by chance alone.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).
    """
    adjusted: dict[Name, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def resampled_sums(scores: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Return float64 (samples, K): the sums over each resample of N images of `scores` (N, K).

    Resample i draws the same images for every column, and for every call with this N and seed.
    """
    images, generator = len(scores), np.random.default_rng(seed)
    sums = np.empty((samples, scores.shape[1]))
    piece = max(1, _DRAWS_AT_ONCE // images)
    for start in range(0, samples, piece):
        rows = min(piece, samples - start)
        drawn = generator.integers(images, size=(rows, images))
        drawn += images * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images)
        sums[start : start + rows] = times @ scores
    return sums


def mean_estimates(
    scores: Mapping[Name, np.ndarray],
    samples: int,
    seed: int,
    *,
    kind: Kind = "score",
    spreads: Mapping[Name, Spread] | None = None,
) -> dict[Name, Estimate]:
    """Estimate the mean of each set of per-image scores, all (N,), from the same resamples.

    A score lies in [0, 1]. A paired difference of two arms' scores lies in [-1, 1], a loss, or a
    difference of losses, anywhere: say so by `kind`. Scores that are means over training seeds have
    `spreads`.
    """
    columns = np.column_stack(list(scores.values())).astype(np.float64)
    made_up = np.repeat(np.array(_EACH_WAY[kind])[:, None], columns.shape[1], axis=1)
    drawn_from = np.vstack([columns, made_up])
    means = resampled_sums(drawn_from, samples, seed) / len(drawn_from)
    estimates = {}
    for place, name in enumerate(scores):
        spread, column = (spreads or {}).get(name, Spread(0.0, 0)), columns[:, place]
        own, centre = _own_share(column, spread), float(drawn_from[:, place].mean())
        of_resamples = centre + (means[:, place] - centre) * own
        of_resamples += _seed_draws(spread, samples, seed)
        of_resamples = of_resamples.clip(*_BOUNDS[kind])
        of_images = own * float(drawn_from[:, place].std()) / np.sqrt(len(drawn_from))
        p = _p_value(centre, of_images, spread)
        estimates[name] = _estimate(float(column.mean()), of_resamples, p)
    return estimates


def _p_value(mean: float, of_images: float, spread: Spread) -> float:
    """Return the two-sided p-value of a mean, by its standard errors from images and from seeds."""
    reach = abs(mean)
    if not of_images:
        if not spread.error:
            return float(mean == 0)
        return float(2 * stdtr(spread.freedom, -reach / spread.error))
    moved = spread.error * _student(spread.freedom) if spread.freedom else np.zeros(1)
    return float(2 * ndtr((moved - reach) / of_images).mean())


@cache
def _student(freedom: int) -> np.ndarray:
    """Return the middles of 10,000 pieces of Student's t, each as likely as another."""
    return stdtrit(freedom, (np.arange(10_000) + 0.5) / 10_000)


def _own_share(scores: np.ndarray, spread: Spread) -> float:
    """Return which share of the deviation of images' scores is their own, not their seeds'."""
    variance = float(scores.var())
    return float(np.sqrt(max(0.0, 1 - spread.of_image / variance))) if variance else 1.0


def _seed_draws(spread: Spread, samples: int, seed: int) -> np.ndarray:
    """Return float64 (samples,): by how much other training seeds would have moved a mean."""
    if not spread.freedom:
        return np.zeros(samples)
    drawn = np.random.default_rng([seed, spread.freedom]).standard_t(spread.freedom, samples)
    return spread.error * drawn


def _estimate(value: float, resampled: np.ndarray, p: float = float("nan")) -> Estimate:
    """Return a value with the middle 95 % of its resamples, widened to hold it."""
    low, high = _middle(resampled)
    return Estimate(value, min(low, value), max(high, value), p)


def ratio_estimate(
    errors: np.ndarray, base: np.ndarray, samples: int, seed: int, spread: Spread
) -> Estimate:
    """Estimate the mean over columns of how large `errors` are relative to `base`, both (N, F).

    1 is as large. `spread` is that of the mean over training seeds, in units of the ratio.
    """
    sums = resampled_sums(np.hstack([errors, base]), samples, seed)
    ours, theirs = np.split(sums, 2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (ours / theirs).mean(axis=1)
    value = float((errors.sum(axis=0) / base.sum(axis=0)).mean())
    of_images = (errors - base) @ (len(base) / base.sum(axis=0)) / base.shape[1]
    moved = value + (ratios - value) * _own_share(of_images, spread)
    moved += _seed_draws(spread, samples, seed)
    return _estimate(value, moved[np.isfinite(moved)])


def calibration_estimate(gaps: np.ndarray, samples: int, seed: int) -> Estimate:
    """Estimate the calibration error from `gaps` (seeds, N, bins), of `calibration.binned_gaps`.

    An error is a sum of absolute values, so chance adds to it, and resampling adds as much again.
    The interval therefore reaches from the low end of the basic bootstrap, which takes that off
    twice, to the high end of the percentiles, which leaves it in; and it starts at zero where a
    classifier that is right as often as it says could have shown as large an error (the consistency
    resampling of Bröcker and Smith, 2007).
    """
    value, resampled = _calibration_errors(gaps, samples, seed)
    low, high = _reflected(value, resampled)
    if value <= _chance_error(gaps, samples, seed):
        low = 0.0
    return Estimate(value, max(0.0, low), high)


def calibration_difference(gaps: np.ndarray, base: np.ndarray, samples: int, seed: int) -> Estimate:
    """Estimate the paired difference of one arm's calibration error to another's.

    The less sure an arm is, the more chance adds to its error, so an interval that leaves 0 out
    shows no difference by itself.
    """
    value, resampled = _calibration_errors(gaps, samples, seed)
    base_value, base_resampled = _calibration_errors(base, samples, seed)
    difference = value - base_value
    return Estimate(difference, *_reflected(difference, resampled - base_resampled))


def _calibration_errors(gaps: np.ndarray, samples: int, seed: int) -> tuple[float, np.ndarray]:
    """Return the error of all images and of each resample, averaged over the training seeds."""
    seeds, images, bins = gaps.shape
    columns = gaps.transpose(1, 0, 2).reshape(images, seeds * bins)
    resampled = np.abs(resampled_sums(columns, samples, seed)).sum(axis=1) / (images * seeds)
    return float(np.abs(columns.sum(axis=0)).sum() / (images * seeds)), resampled


def _chance_error(gaps: np.ndarray, samples: int, seed: int) -> float:
    """Return the error that calibrated answers of the same confidences exceed in 1 of 40 cases."""
    confidence = np.where(gaps > 0, 1 - gaps, -gaps)  # a gap is 1 less it, or 0 less it
    deviation = np.sqrt((confidence * (1 - confidence)).sum(axis=1))  # (seeds, bins)
    drawn = np.abs(np.random.default_rng(seed).standard_normal((samples, deviation.shape[1])))
    errors = drawn @ deviation.mean(axis=0) / gaps.shape[1]
    return float(np.quantile(errors, (1 + CONFIDENCE) / 2))


def _middle(resampled: np.ndarray) -> tuple[float, float]:
    """Return the ends of the middle 95 % of the resamples."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # Sums of thirds are zero but for their last bits.
    return round(float(low), 9), round(float(high), 9)


def _reflected(value: float, resampled: np.ndarray) -> tuple[float, float]:
    """Return an interval that holds the percentiles and their reflection in the value."""
    low, high = _middle(resampled)
    return min(low, 2 * value - high), max(high, 2 * value - low)
