"""Statistics: what a bootstrap must give by hand, by theory, and in any case."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.intervals import differences_to_first, simulated_answers
from diffusemix_pipeline.evaluation import statistics
from diffusemix_pipeline.evaluation.calibration import binned_gaps
from diffusemix_pipeline.evaluation.statistics import (
    Estimate,
    Spread,
    calibration_difference,
    calibration_estimate,
    difference_spread,
    holm,
    mean_estimates,
    ratio_estimate,
    resampled_sums,
    score_spread,
    uneven_seeds,
)

RNG = np.random.default_rng(0)


def mean_estimate(scores: np.ndarray, samples: int, seed: int, **kind: Any) -> Estimate:
    return mean_estimates({"alone": scores}, samples, seed, **kind)["alone"]


def answers(images: int, seed: int, *, off_by: float) -> np.ndarray:
    """Gaps of a classifier that is 60 to 99 % sure, and right that much less often."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(0.6, 0.99, images)
    right = rng.random(images) < sure - off_by
    probabilities = np.stack([sure, 1 - sure], axis=1).astype(np.float32)
    return binned_gaps(probabilities, np.where(right, 0, 1))[None]


@given(st.floats(0, 1), st.integers(1, 50))
def test_a_few_images_that_agree_are_not_certain(constant, images):
    estimate = mean_estimate(np.full(images, constant), 100, seed=1)
    assert estimate.value == pytest.approx(constant)
    assert 0 <= estimate.low <= constant + 1e-9
    assert constant - 1e-9 <= estimate.high <= 1
    assert estimate.high - estimate.low > 0.01


def test_all_right_is_almost_certain():
    estimate = mean_estimate(np.ones(180), 1000, seed=0)
    assert 0.95 < estimate.low < estimate.value == estimate.high == 1


@pytest.mark.parametrize(
    ("mended", "broken", "significant"), [(4, 0, False), (7, 1, False), (12, 0, True)]
)
def test_few_changed_answers_of_many_are_not_significant(mended, broken, significant):
    change = np.repeat([1.0, -1.0, 0.0], [mended, broken, 700 - mended - broken])
    for sign in (1, -1):
        estimate = mean_estimate(sign * change, 2000, seed=0, kind="difference")
        assert estimate.value == sign * (mended - broken) / 700
        assert estimate.holds_zero != significant


@pytest.mark.parametrize("kind", ["score", "difference"])
def test_made_up_images_change_nothing_where_there_are_many(monkeypatch, kind):
    scores = np.arange(10_000) < 8_000
    estimate = mean_estimate(scores, 4000, seed=0, kind=kind)
    monkeypatch.setattr(statistics, "_EACH_WAY", {kind: ()})
    alone = mean_estimate(scores, 4000, seed=0, kind=kind)
    assert [estimate.low, estimate.high] == pytest.approx([alone.low, alone.high], abs=0.001)


def test_the_interval_of_a_share_is_the_textbooks():
    estimate = mean_estimate(np.arange(1000) < 800, 4000, seed=0)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert estimate.value == 0.8
    assert [estimate.low, estimate.high] == pytest.approx([0.8 - half, 0.8 + half], abs=0.003)


def test_intervals_cover_the_truth_about_95_times_in_100():
    covered = 0
    for trial in range(200):
        estimate = mean_estimate(np.random.default_rng(trial).random(80) < 0.7, 300, seed=trial)
        covered += estimate.low <= 0.7 <= estimate.high
    assert 180 <= covered <= 199


def test_a_paired_difference_has_the_sign_and_not_the_spread_of_its_arms():
    hard = RNG.random(400)  # both arms find the same images hard
    worse, better = hard > 0.5, hard > 0.45
    difference = mean_estimate(better.astype(float) - worse, 1000, seed=0, kind="difference")
    alone = mean_estimate(better, 1000, seed=0)
    assert 0 < difference.low < difference.value < difference.high
    assert difference.high - difference.low < (alone.high - alone.low) / 2
    opposite = mean_estimate(worse.astype(float) - better, 1000, seed=0, kind="difference")
    assert opposite.value == -difference.value
    ends = [-difference.high, -difference.low]  # other resamples, as the made-up images turn over
    assert [opposite.low, opposite.high] == pytest.approx(ends, abs=0.005)


def test_sets_of_scores_are_estimated_as_each_alone():
    first, second = RNG.random((2, 60))
    both = mean_estimates({"a": first, "b": second}, 200, seed=0)
    assert both == {"a": mean_estimate(first, 200, 0), "b": mean_estimate(second, 200, 0)}


def test_sums_by_hand_and_the_same_images_for_every_column(monkeypatch):
    scores = RNG.random((7, 2))
    drawn = np.random.default_rng(5).integers(7, size=(9, 7))
    assert resampled_sums(scores, 9, seed=5) == pytest.approx(scores[drawn].sum(axis=1))
    whole = resampled_sums(scores, 9, seed=5)
    monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", 20)  # pieces change nothing
    assert resampled_sums(scores, 9, seed=5) == pytest.approx(whole)


def test_the_calibration_error_by_hand():
    gaps = np.zeros((1, 400, 2))
    gaps[0, :200, 0], gaps[0, 200:, 1] = 0.3, -0.1  # the images of a bin are alike
    estimate = calibration_estimate(gaps, 500, seed=0)
    assert estimate.value == pytest.approx((200 * 0.3 + 200 * 0.1) / 400)
    assert 0.18 < estimate.low < estimate.value < estimate.high < 0.22


def test_a_few_answers_may_be_calibrated():
    gaps = np.zeros((1, 4, 2))
    gaps[0, :2, 0], gaps[0, 2:, 1] = 0.3, -0.1  # right when 70 % sure, wrong when 10 % sure
    assert calibration_estimate(gaps, 500, seed=0).low == 0


@pytest.mark.parametrize("off_by", [0.0, 0.03, 0.1])
def test_intervals_of_the_calibration_error_cover_the_truth(off_by):
    truth = np.abs(answers(1_000_000, 0, off_by=off_by)[0].sum(axis=0)).sum() / 1_000_000
    covered = 0
    for trial in range(1, 101):
        estimate = calibration_estimate(answers(300, trial, off_by=off_by), 200, seed=trial)
        covered += estimate.low <= truth <= estimate.high
        assert 0 <= estimate.low <= estimate.value <= estimate.high
    assert covered >= 93


def test_an_arm_against_itself_does_not_differ():
    gaps = answers(50, 0, off_by=0.1)
    estimate = calibration_difference(gaps, gaps, 200, seed=0)
    assert estimate == Estimate(0, 0, 0)
    assert estimate.holds_zero


def test_zero_at_the_edge_is_held():
    assert Estimate(0.1, 0.0, 0.2).holds_zero
    assert not Estimate(0.1, 0.01, 0.2).holds_zero
    assert not Estimate(-0.1, -0.2, -0.01).holds_zero


def test_with_several_seeds_intervals_cover_other_seeds_as_well():
    held = [
        differences_to_first(simulated_answers(2, 3, 600, 0.15, trial), 300, trial)[1].holds_zero
        for trial in range(120)
    ]
    assert np.mean(held) > 0.9
    # What the same noise does to a comparison of one seed: the reason for the report's note.
    alone = [
        differences_to_first(simulated_answers(2, 1, 600, 0.15, trial), 300, trial)[1].holds_zero
        for trial in range(120)
    ]
    assert np.mean(alone) < 0.8


def test_one_false_alarm_in_twenty_is_for_all_arms_together():
    alarms = 0
    for trial in range(200):
        answers = simulated_answers(8, 3, 600, 0.15, trial)
        found = differences_to_first(answers, 300, trial)
        alarms += min(holm({arm: of.p for arm, of in found.items()}).values()) < 0.05
    assert alarms <= 16  # 10 are meant; more than 16 come in 2 of 100 such tests


def alike(means: list[list[float]], images: int = 50) -> np.ndarray:
    """Scores (arms, seeds, images) with these means, the same for every image."""
    return np.repeat(np.array(means)[:, :, None], images, axis=2)


def test_spreads_by_hand():
    means = alike([[0.1, 0.3], [0.4, 0.4]])
    assert score_spread(means).freedom == 2
    assert score_spread(means).error == pytest.approx(np.sqrt((2 * 0.1**2) / 2 / 2))
    paired = np.array([0.3, 0.1])  # of two arms, the paired t-test
    assert difference_spread(means).freedom == 1
    assert difference_spread(means).error == pytest.approx(paired.std(ddof=1) / np.sqrt(2))
    assert difference_spread(means[:, :1]) == score_spread(means[:, :1]) == (0, 0, 0)
    assert score_spread(means).of_image == pytest.approx(0)  # all images alike


def test_what_a_seed_does_to_all_arms_is_no_spread_of_their_difference():
    means = alike([[0.1, 0.3, 0.2], [0.4, 0.6, 0.5]])
    assert difference_spread(means).error == pytest.approx(0, abs=1e-12)
    assert score_spread(means).error > 0.05


def test_what_seeds_answer_otherwise_is_counted_once():
    """Without any effect of seeds, an interval is no wider than seeds' draws make it."""
    widths = []
    for trial in range(20):
        answers = simulated_answers(8, 3, 1000, 0.0, trial)
        found = differences_to_first(answers, 300, trial)[1]
        alone = (answers[1] - answers[0]).mean(axis=0).std() / np.sqrt(1000)
        widths.append((found.high - found.low) / (2 * 1.96 * alone))
    assert 0.9 < np.mean(widths) < 1.2


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.04}) == {"a": 0.04}
    assert holm({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_only_raises(p_values):
    adjusted = holm(p_values)
    assert adjusted.keys() == p_values.keys()
    for name, p in p_values.items():
        assert p <= adjusted[name] <= 1
        assert all(adjusted[other] >= adjusted[name] for other in p_values if p_values[other] > p)


def test_p_values_agree_with_intervals():
    for shift in np.linspace(-0.02, 0.02, 9):
        change = np.repeat([1.0, -1.0, 0.0], [30, 30 + round(1000 * shift), 940])
        estimate = mean_estimate(change, 2000, seed=0, kind="difference")
        assert (estimate.p < 0.05) == (not estimate.holds_zero)


def test_p_values_are_the_textbooks():
    change = RNG.normal(0.05, 1, 50)
    alone = mean_estimate(change, 100, seed=0, kind="loss").p
    z = change.mean() / (change.std() / np.sqrt(50))
    assert alone == pytest.approx(2 * stats.norm.sf(abs(z)))
    nothing = Spread(1.0, 4)  # seeds alone: the images are alike
    of_seeds = mean_estimates({0: np.full(9, 2.5)}, 100, 0, kind="loss", spreads={0: nothing})[0].p
    assert of_seeds == pytest.approx(2 * stats.t.sf(2.5, 4))
    assert mean_estimate(np.zeros(9), 100, seed=0, kind="loss").p == 1


@pytest.mark.parametrize("freedom", [2, 4, 22])
@pytest.mark.parametrize("of_seeds", [0.0, 0.1, 0.3])
def test_p_values_agree_with_intervals_of_several_seeds(freedom, of_seeds):
    spread, noise = Spread(of_seeds, freedom), np.random.default_rng(0).normal(0, 1, 100)
    for mean in np.linspace(0, 2, 21):
        scores = {0: noise - noise.mean() + mean}
        found = mean_estimates(scores, 20_000, 0, kind="loss", spreads={0: spread})[0]
        if abs(found.p - 0.05) > 0.004:  # resamples are drawn
            assert (found.p < 0.05) == (not found.holds_zero)


def test_a_verdict_does_not_depend_on_how_resamples_fall():
    answers = simulated_answers(12, 3, 240, 0.15, 0)
    first, second = (differences_to_first(answers, 1000, seed) for seed in (0, 1))
    assert first != second
    assert {arm: of.p for arm, of in first.items()} == {arm: of.p for arm, of in second.items()}


def test_a_ratio_of_errors_by_hand_and_its_cover():
    rng = np.random.default_rng(0)
    truth = 0.25 / 0.5
    covered = 0
    for trial in range(100):
        errors, base = rng.random((200, 2)) < 0.25, rng.random((200, 2)) < 0.5
        none = difference_spread(np.zeros((2, 1, 1)))
        estimate = ratio_estimate(errors.astype(float), base.astype(float), 300, trial, none)
        assert estimate.value == pytest.approx((errors.sum(0) / base.sum(0)).mean())
        covered += estimate.low <= truth <= estimate.high
    assert covered >= 88


def test_seeds_further_apart_than_the_others_are_found_and_seldom_by_chance():
    alike = {"a": 0.01, "b": 0.02, "c": 0.01}
    assert uneven_seeds(alike, 3) == {}
    assert uneven_seeds({"alone": 0.1}, 3) == {}
    assert uneven_seeds({"a": 0.0, "b": 0.0}, 3) == {}
    assert uneven_seeds({"a": 0.0, "b": 0.1}, 3) == {"b": 0}
    found = uneven_seeds({**alike, "far": 0.3}, 3)
    assert found == {"far": pytest.approx(np.sqrt((0.01**2 + 0.02**2 + 0.01**2) / 3))}
    rng = np.random.default_rng(0)
    of_reports = rng.standard_normal((2000, 12, 3)).std(axis=2, ddof=1)
    alarms = np.mean([bool(uneven_seeds(dict(enumerate(one)), 3)) for one in of_reports])
    assert 0.03 < alarms < 0.07  # 0.05, of 2000
