"""Statistics: how far a number could have come out otherwise with other test images.

The percentile bootstrap: test images are drawn anew, with replacement, many times. One call draws
the same images for all that it compares, so a difference between two arms is paired: what makes an
image hard for both does not widen its interval.

A bootstrap alone is too sure of itself where few images tell: 4 answers mended and none broken
would be significant, and all right would be certain. So a few made-up images join those that are
drawn from, one or two each way, as in the intervals of Agresti and Coull (1998) for a proportion
and of Agresti and Min (2005) for a paired difference; with many images they change nothing.

Training runs are not drawn anew: with one training seed, an interval covers the sampling of test
images only; with several, numbers are means over the seeds, and the same holds of them.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

CONFIDENCE = 0.95
# The scores of the made-up images.
_EACH_WAY = {"score": (0.0, 0.0, 1.0, 1.0), "difference": (-1.0, 1.0)}
Name = TypeVar("Name", bound=Hashable)
_DRAWS_AT_ONCE = 4_000_000  # images drawn in one piece: what bounds the memory


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, from `low` to `high`."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether 0 lies in the interval: no significant difference, for a difference."""
        return self.low <= 0 <= self.high


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
    kind: Literal["score", "difference"] = "score",
) -> dict[Name, Estimate]:
    """Estimate the mean of each set of per-image scores, all (N,), from the same resamples.

    A score lies in [0, 1]. A paired difference of two arms' scores lies in [-1, 1]: say so by
    `kind`.
    """
    columns = np.column_stack(list(scores.values()))
    made_up = np.repeat(np.array(_EACH_WAY[kind])[:, None], columns.shape[1], axis=1)
    drawn_from = np.vstack([columns, made_up])
    means = resampled_sums(drawn_from, samples, seed) / len(drawn_from)
    return {
        name: _holding(float(column.mean()), *_middle(of_resamples))
        for name, column, of_resamples in zip(scores, columns.T, means.T, strict=True)
    }


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


def _holding(value: float, low: float, high: float) -> Estimate:
    """Widen an interval that the made-up images drew past the value of a few images."""
    return Estimate(value, min(low, value), max(high, value))


def _reflected(value: float, resampled: np.ndarray) -> tuple[float, float]:
    """Return an interval that holds the percentiles and their reflection in the value."""
    low, high = _middle(resampled)
    return min(low, 2 * value - high), max(high, 2 * value - low)
