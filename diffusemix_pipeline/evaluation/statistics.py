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

from dataclasses import dataclass
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
# The scores of the made-up images.
_EACH_WAY = {"score": (0.0, 0.0, 1.0, 1.0), "difference": (-1.0, 1.0)}
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


def mean_estimate(
    scores: np.ndarray, samples: int, seed: int, *, kind: Literal["score", "difference"] = "score"
) -> Estimate:
    """Estimate the mean of per-image `scores`: (N,), or (seeds, N), which are averaged first.

    A score lies in [0, 1]. A paired difference of two arms' scores lies in [-1, 1]: say so by
    `kind`.
    """
    of_image = np.atleast_2d(scores).mean(axis=0)
    drawn_from = np.append(of_image, _EACH_WAY[kind])
    means = resampled_sums(drawn_from[:, None], samples, seed)[:, 0] / len(drawn_from)
    return _estimate(float(of_image.mean()), means)


def calibration_estimate(
    gaps: np.ndarray, samples: int, seed: int, *, against: np.ndarray | None = None
) -> Estimate:
    """Estimate the calibration error from `gaps` (seeds, N, bins), of `calibration.binned_gaps`.

    With `against`, another arm's gaps for the same images, estimate the paired difference to it. An
    error is a sum of absolute values, so chance can only add to it: resamples lie somewhat above
    the value, and the interval with them. Much of that cancels in a difference.
    """
    value, resampled = _calibration_errors(gaps, samples, seed)
    if against is not None:
        other_value, other_resampled = _calibration_errors(against, samples, seed)
        value, resampled = value - other_value, resampled - other_resampled
    return _estimate(value, resampled)


def _calibration_errors(gaps: np.ndarray, samples: int, seed: int) -> tuple[float, np.ndarray]:
    """Return the error of all images and of each resample, averaged over the training seeds."""
    seeds, images, bins = gaps.shape
    columns = gaps.transpose(1, 0, 2).reshape(images, seeds * bins)
    resampled = np.abs(resampled_sums(columns, samples, seed)).sum(axis=1) / (images * seeds)
    return float(np.abs(columns.sum(axis=0)).sum() / (images * seeds)), resampled


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # Sums of thirds are zero but for their last bits.
    return Estimate(value, round(float(low), 9), round(float(high), 9))
