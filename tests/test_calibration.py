"""Calibration: a case by hand, and agreement of the binned form with the metric."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from diffusemix_pipeline.evaluation.calibration import (
    BINS,
    binned_gaps,
    expected_calibration_error,
    reliability_curve,
)

# Two images at 0.9, one of them right, and two at 0.6, both right.
PROBABILITIES = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4]], np.float32)
LABELS = np.array([0, 1, 1, 0])


def test_the_error_by_hand():
    expected = 0.5 * abs(0.5 - 0.9) + 0.5 * abs(1.0 - 0.6)
    assert expected_calibration_error(PROBABILITIES, LABELS) == pytest.approx(expected)
    gaps = binned_gaps(PROBABILITIES, LABELS)
    assert np.abs(gaps.sum(axis=0)).sum() / 4 == pytest.approx(expected)


def test_the_curve_by_hand():
    curve = reliability_curve(PROBABILITIES, LABELS)
    assert len(curve) == BINS
    known = curve.dropna()
    assert known["confidence"].tolist() == pytest.approx([0.6, 0.9])
    assert known["accuracy"].tolist() == [1.0, 0.5]
    assert curve["images"].sum() == 4


def test_a_sure_and_right_classifier_has_no_error():
    assert expected_calibration_error(np.eye(3, dtype=np.float32), np.arange(3)) == 0


@given(
    arrays.arrays(np.float32, (30, 4), elements=st.floats(-12, 12, width=32)),
    arrays.arrays(np.int64, 30, elements=st.integers(0, 3)),
)
def test_the_binned_form_is_the_metric(logits, labels):
    exponentials = np.exp(logits)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    binned = np.abs(binned_gaps(probabilities, labels).sum(axis=0)).sum() / len(labels)
    error = expected_calibration_error(probabilities, labels)
    assert binned == pytest.approx(error, abs=1e-4)  # the metric adds up in float32
