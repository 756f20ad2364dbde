"""Calibration: whether a classifier that is 80 % sure is right 80 % of the time.

What belongs here: binning of confidences, the expected calibration error, the reliability curve,
and the two proper scores that reward calibration with accuracy.
What does not: intervals (statistics), drawing (pictures).
"""

import numpy as np
import pandas as pd

BINS = 15
_LEAST = 1e-12  # where float32 rounds a probability to zero, its logarithm stays finite


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the gap between confidence and accuracy, 0 to 1, weighed over 15 bins of equal width.

    `probabilities` are float (N, classes) with rows that add up to 1, `labels` int (N,).

    Source: Guo et al., On Calibration of Modern Neural Networks (2017), equation 3; by
    torchmetrics.
    """
    # Imported here, as it takes seconds.
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    # Where rounding put one above 1, the metric would take them all for logits.
    clipped = torch.tensor(np.clip(probabilities, 0, 1), dtype=torch.float64)
    error = multiclass_calibration_error(
        clipped, torch.tensor(labels), num_classes=probabilities.shape[1], n_bins=BINS, norm="l1"
    )
    return float(error)


def brier_scores(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return float64 (N,): the squared distance, 0 to 2, of each answer to the truth (Brier, 1950).

    `probabilities` are float (N, classes) with rows that add up to 1, `labels` int (N,).
    """
    distance = probabilities.astype(np.float64)
    distance[np.arange(len(labels)), labels] -= 1
    return (distance**2).sum(axis=1)


def negative_log_likelihoods(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return float64 (N,): each answer's negative log-likelihood of the truth, in nats."""
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(own.clip(min=_LEAST))


def binned_gaps(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return float64 (N, 15): each image's correctness less confidence, in the column of its bin.

    The error of any sample of the images is the sum over bins of the absolute sums over its images,
    divided by their number; this is what a bootstrap needs.
    """
    confidence, correct, bins = _binned(probabilities, labels)
    gaps = np.zeros((len(labels), BINS))
    gaps[np.arange(len(labels)), bins] = correct - confidence
    return gaps


def reliability_curve(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Return a row a bin: confidence and accuracy (NaN where empty), and how many images."""
    confidence, correct, bins = _binned(probabilities, labels)
    images = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "confidence": np.bincount(bins, confidence, BINS) / images,
                "accuracy": np.bincount(bins, correct, BINS) / images,
                "images": images,
            }
        )


def _binned(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each image's confidence and correctness, float64, and its bin as in torchmetrics."""
    confidence = np.clip(probabilities.max(axis=1), 0, 1).astype(np.float64)
    correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    inner_edges = np.linspace(0, 1, BINS + 1, dtype=np.float32)[1:-1]
    return confidence, correct, np.digitize(confidence, inner_edges)
