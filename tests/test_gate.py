"""Promises of the gate: what it rejects and why, and how many real images it would."""

import hypothesis
import numpy as np
import pandas as pd
import pytest
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from diffusemix_pipeline.datasets.images import to_square
from diffusemix_pipeline.editing.gate import (
    ACCEPTED,
    change,
    class_thresholds,
    lost_structure,
    verdicts,
    yield_table,
)
from diffusemix_pipeline.editing.planning import case
from diffusemix_pipeline.editing.verdicts import Verdicts
from diffusemix_pipeline.settings import Gate

PHOTOS = np.stack([to_square(picture(seed), 32) for seed in range(6)])
DIGITS = np.repeat(
    (load_digits().images[:40] * 15.9).astype(np.uint8).repeat(4, 1).repeat(4, 2)[..., None], 3, 3
)
ANY = Gate(min_change=0, max_change=1)


def test_every_verdict_comes_back_and_the_last_counts():
    # Of so many digests, some end with a zero byte, which numpy takes away.
    said = [
        {"key": f"{number:032x}", "label": label, "verdict": (ACCEPTED, "label")[number % 2]}
        for number in range(2000)
        for label in ("cat", "dog")
    ]
    again = {**said[0], "verdict": "flat"}
    told = Verdicts([*said, again])
    for fact in (again, *said[1:]):
        assert told.get(case(fact["key"], fact["label"])) == fact["verdict"]
    assert case("0" * 32, "cow") not in told
    assert case("0" * 32, "cat") not in Verdicts([])


def judged(originals, edits, gate: Gate = ANY, labels=0, certainty=1.0) -> list[str]:
    """Judge by classifiers that give each edit's label the probability `certainty`."""
    labels = np.zeros(len(edits), int) + labels
    probabilities = np.zeros((len(edits), 3), np.float32)
    probabilities[np.arange(len(edits)), labels] = certainty
    return verdicts(originals, edits, labels, probabilities, np.full(3, 0.5), gate)


def plain(level: int, noise: int = 0, side: int = 32) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (level + rng.integers(-noise, noise + 1, (1, side, side, 3))).astype(np.uint8)


@pytest.mark.parametrize("side", [16, 32, 80])
@pytest.mark.parametrize(
    ("level", "noise", "verdict"),
    [
        *((0, 0, "black"), (6, 6, "black"), (255, 0, "white"), (249, 6, "white")),
        *((128, 0, "flat"), (128, 6, "flat"), (30, 0, "flat")),
    ],
)
def test_an_edit_of_one_tone_is_rejected(level, noise, verdict, side):
    original = to_square(picture(0, (side, side)), side)[None]
    edit = plain(level, noise, side)
    assert judged(original, edit) == [verdict]
    edit[0, 3, 3] = 200  # a stray pixel is no picture
    assert side < 32 or judged(original, edit) == [verdict]


def test_dark_bright_and_pale_pictures_pass():
    assert set(judged(PHOTOS[[0] * 40], DIGITS)) == {ACCEPTED}  # strokes on a black ground
    assert set(judged(PHOTOS[[0] * 40], 255 - DIGITS)) == {ACCEPTED}
    pale = (PHOTOS // 8 + 100).astype(np.uint8)
    assert set(judged(PHOTOS, pale)) == {ACCEPTED}


def test_one_tone_is_no_fault_of_an_edit_whose_original_has_it():
    for level in (0, 128, 255):
        assert judged(plain(level), plain(level, 3 if level == 128 else 0)) == [ACCEPTED]
    assert judged(plain(255), plain(0)) == ["black"]


def test_an_edit_that_changed_nothing_is_rejected():
    rng = np.random.default_rng(0)
    noisy = np.clip(PHOTOS + rng.integers(-6, 7, PHOTOS.shape), 0, 255).astype(np.uint8)
    tinted = (PHOTOS * [1.0, 0.8, 0.7]).astype(np.uint8)
    assert set(judged(PHOTOS, PHOTOS, Gate())) == {"unchanged"}
    assert set(judged(PHOTOS, noisy, Gate())) == {"unchanged"}
    assert set(judged(PHOTOS, tinted, Gate())) == {ACCEPTED}
    assert set(judged(PHOTOS, PHOTOS, ANY)) == {ACCEPTED}


def test_another_picture_changed_too_much_and_another_style_did_not():
    night = (PHOTOS * [0.3, 0.4, 0.7]).astype(np.uint8)
    assert set(judged(PHOTOS, night, Gate())) == {ACCEPTED}
    assert set(judged(PHOTOS, PHOTOS[::-1], Gate())) == {"changed too much"}
    assert set(judged(PHOTOS, PHOTOS[::-1], ANY)) == {ACCEPTED}


@pytest.mark.parametrize("side", [64, 512])
def test_the_band_means_the_same_for_every_size(side):
    large = np.stack([to_square(picture(seed, (512, 512)), side) for seed in range(4)])
    small = np.stack([to_square(picture(seed, (512, 512)), 32) for seed in range(4)])
    for measure in (change, lost_structure):
        values = measure(large, large[::-1])
        assert ((values >= 0) & (values <= 1)).all()
        assert values == pytest.approx(measure(small, small[::-1]), abs=0.03)


def test_an_edit_whose_label_is_unlikely_is_rejected():
    edits = (PHOTOS * 0.7).astype(np.uint8)
    assert set(judged(PHOTOS, edits, certainty=0.5)) == {ACCEPTED}
    assert set(judged(PHOTOS, edits, certainty=0.49)) == {"label"}
    assert set(judged(PHOTOS, edits, certainty=np.nan)) == {"label"}


def test_the_first_reason_is_told():
    assert judged(PHOTOS[:1], plain(0), Gate(), certainty=0) == ["black"]
    assert judged(PHOTOS[:1], PHOTOS[:1], Gate(), certainty=0) == ["unchanged"]


@hypothesis.settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_verdict_depends_on_its_own_edit_alone(order, taken):
    edits = np.concatenate([PHOTOS[:2], PHOTOS[4:1:-1], plain(0)])
    labels = np.array([0, 1, 2, 0, 1, 2])
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], 6)
    chosen = np.array(order[:taken])

    def some(index):
        thresholds = np.array([0.1, 0.3, 0.5])
        of_each = (PHOTOS[index], edits[index], labels[index], probabilities[index])
        return verdicts(*of_each, thresholds, Gate())

    together = some(np.arange(6))
    assert some(chosen) == [together[index] for index in chosen]


def scores(rng: np.random.Generator, images: int, classes: int = 2) -> np.ndarray:
    """Return probabilities (images, classes) in which all classes are equally hard."""
    return rng.dirichlet(np.full(classes, 0.5), images)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("images", [19, 60, 333])
def test_of_further_real_images_the_promised_share_is_rejected(rate, images):
    rng, rejected = np.random.default_rng(0), []
    labels = np.arange(images * 2) % 2
    for _ in range(400):
        thresholds = class_thresholds(scores(rng, images * 2)[:, 0], labels, 2, rate)
        rejected.append(scores(rng, 200)[:, 0] < thresholds[0])
    share = np.mean(rejected)
    # The exact expectation is floor(rate * (n + 1)) / (n + 1).
    assert share == pytest.approx(int(rate * (images + 1)) / (images + 1), abs=0.01)
    assert share <= rate + 0.01


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=120),
    st.floats(0.01, 0.49),
    st.integers(0, 2**32 - 1),
)
def test_thresholds_reject_no_more_of_the_images_that_set_them(labels, rate, seed):
    labels = np.array(labels)
    own = np.random.default_rng(seed).random(len(labels))
    thresholds = class_thresholds(own, labels, 4, rate)
    assert ((thresholds >= 0) & (thresholds <= 1)).all()
    for label in range(4):
        of_class = own[labels == label]
        if int(rate * (len(of_class) + 1)):
            assert (of_class < thresholds[label]).mean() <= rate


def test_equal_probabilities_are_not_rejected():
    assert class_thresholds(np.full(40, 0.25), np.zeros(40, int), 1, 0.2).tolist() == [0.25]


def test_a_label_likelier_than_not_is_kept_however_sure_classifiers_are_of_real_images():
    assert class_thresholds(np.ones(40), np.zeros(40, int), 1, 0.2).tolist() == [0.5]


def test_small_classes_share_a_threshold_of_their_own():
    # Class 0 is large and easy; 1 and 2 are small and hard, and 20 images together.
    labels = np.repeat([0, 1, 2], [100, 12, 8])
    own = np.concatenate([np.linspace(0.4, 1, 100), np.linspace(0.1, 0.3, 20)])
    easy, *hard = class_thresholds(own, labels, 3, 0.05)
    assert easy >= 0.4
    assert hard == [0.1, 0.1]


def test_where_small_classes_are_too_few_together_all_images_set_their_threshold():
    labels = np.repeat([0, 1], [100, 5])
    own = np.concatenate([np.linspace(0.2, 1, 100), np.full(5, 0.7)])
    large, small = class_thresholds(own, labels, 2, 0.05)
    assert small == pytest.approx(large, abs=0.02)
    assert 0.2 < small < 0.3


def test_too_few_images_for_any_promise_reject_nothing():
    thresholds = class_thresholds(np.full(18, 0.5), np.arange(18) % 2, 2, 0.05)
    assert thresholds.tolist() == [0, 0]


def test_the_yield_is_counted_by_class_and_prompt():
    rows = [
        *(("cat", "fog", ACCEPTED), ("cat", "fog", "label"), ("cat", "art", "black")),
        ("ant", "fog", ACCEPTED),
    ]
    table = yield_table(pd.DataFrame(rows, columns=["label", "prompt", "verdict"]))
    assert table.index.tolist() == ["ant", "cat"]
    assert table.columns.tolist() == ["art", "fog"]
    assert table.loc["cat"].tolist() == [0, 0.5]
    assert np.isnan(table.loc["ant", "art"])
