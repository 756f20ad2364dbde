"""A model's scores as MLflow keeps them: what each number is, and that none is invented."""

import dataclasses

import numpy as np
import pytest

from diffusemix_pipeline.evaluation.evidence import Evidence
from diffusemix_pipeline.evaluation.metrics import model_metrics

RIGHT = [True, True, True, False]


def answered(**changed) -> Evidence:
    """Return the answers of a model that is 75 % sure, and right on three of four images."""
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.25]], np.float32)
    given = Evidence(
        ids=("a", "b", "c", "d"),
        labels=labels,
        probabilities=probabilities,
        epsilons=(2.0, 8.0),
        fgsm=np.array([[True, True, False, False], [False] * 4]),
        attack_epsilon=8.0,
        attacked=np.array([0, 2]),
        pgd=np.array([True, False]),
        autoattack=np.array([False]),
        corruptions=("fog", "contrast"),
        severities=(1,),
        corrupted=np.array([[RIGHT], [[False] * 3 + [True]]]),
        published_sets=("fog/1", "saturate/1", "snow/5"),
        published=np.array([RIGHT, [False] * 4, [True] * 4]),
    )
    return dataclasses.replace(given, **changed)


def test_every_score_is_named_and_is_what_its_name_says():
    base = answered(corrupted=np.array([[[True, True, False, False]], [[False] * 4]]))
    assert model_metrics(answered(), base, ["contrast"]) == pytest.approx(
        {
            "test_clean": 0.75,
            "test_corrupted": 0.5,
            "test_corrupted_unshared": 0.75,
            "test_mce_to_vanilla": (0.25 / 0.5 + 0.75 / 1) / 2,
            "test_mce_to_vanilla_unshared": 0.25 / 0.5,
            "test_brier": (3 * 2 * 0.25**2 + 2 * 0.75**2) / 4,
            "test_nll": -(3 * np.log(0.75) + np.log(0.25)) / 4,
            "test_ece": 0.0,
            "test_pgd_20_8_255": 0.5,
            "test_autoattack_8_255": 0.0,
            "test_fgsm_2_255": 0.5,
            "test_fgsm_8_255": 0.0,
            "test_fog": 0.75,
            "test_contrast": 0.25,
            "test_published": (0.75 + 1) / 2,  # saturate is none of the fifteen families
        }
    )


def test_what_was_not_asked_is_missing():
    asked = answered(
        epsilons=(),
        fgsm=np.zeros((0, 4), bool),
        pgd=np.zeros(0, bool),
        autoattack=np.zeros(0, bool),
        corruptions=(),
        corrupted=np.zeros((0, 1, 4), bool),
        published_sets=(),
        published=np.zeros((0, 0), bool),
    )
    assert set(model_metrics(asked, asked, [])) == {
        "test_clean", "test_brier", "test_nll", "test_ece",
    }  # fmt: skip


def test_no_error_is_relative_to_none():
    flawless = answered(corrupted=np.ones((2, 1, 4), bool))
    for base in (None, flawless):
        assert not [name for name in model_metrics(answered(), base, []) if "mce" in name]


def test_all_families_shared_or_none_leaves_one_average():
    for left_out in ([], ["fog", "contrast"]):
        assert "test_corrupted_unshared" not in model_metrics(answered(), None, left_out)
