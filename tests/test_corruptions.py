"""Corruptions: every family is seeded by image, grows with severity, and works at any size."""

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusemix_pipeline.evaluation.corruptions import corrupt
from diffusemix_pipeline.settings import Corruption

FAMILIES = get_args(Corruption)
DRAWN = [
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "elastic_transform",
]


def picture(side: int, seed: int = 0) -> np.ndarray:
    """Return smooth shapes with some detail, uint8 (side, side, 3), alike at every side."""
    y, x = np.mgrid[:side, :side] / side
    waves = [
        np.sin(6 * x + seed) * np.cos(5 * y),
        np.sin(9 * x * y + seed),
        np.cos(17 * x + 13 * y),
    ]
    return np.stack([(120 + 100 * wave) for wave in waves], axis=2).clip(0, 255).astype(np.uint8)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("family", FAMILIES)
def test_severity_grows_from_mild_to_severe(family, side):
    images = np.stack([picture(side, seed) for seed in range(4)])
    corrupted = [corrupt(images, family, severity, list("abcd"), 0) for severity in range(1, 6)]
    distances = [distance(images, changed) for changed in corrupted]
    assert (np.diff(distances) > 0).all()
    assert distances[0] < 0.9 * distances[-1]
    for changed in corrupted:
        assert changed.dtype == np.uint8
        assert changed.shape == images.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_the_worst_still_looks_like_the_image(family):
    image = picture(64)
    changed = corrupt(image[None], family, 5, ["a"], 0)[0]
    correlation = np.corrcoef(image.mean(axis=2).ravel(), changed.mean(axis=2).ravel())[0, 1]
    assert correlation > 0.5


@pytest.mark.parametrize("side", [448, 1024])
def test_of_a_large_image_too_a_part_is_left_by_impulses(side):
    image = picture(side)
    changed = corrupt(image[None], "impulse_noise", 5, ["a"], 0)[0]
    assert (changed == image).mean() > 0.3
    assert 0.2 < (changed == 0).mean() / (changed == 255).mean() < 5
    milder = corrupt(image[None], "impulse_noise", 4, ["a"], 0)[0]
    assert (milder == image).mean() > (changed == image).mean() + 0.05


@settings(max_examples=10, deadline=None)
@given(
    st.permutations(range(5)),
    st.integers(1, 5),
    st.sampled_from(FAMILIES),
)
def test_an_image_is_the_same_in_any_batch_and_order(order, size, family):
    images = np.stack([picture(24, seed) for seed in range(5)])
    ids = [f"image-{number}" for number in range(5)]
    whole = corrupt(images, family, 3, ids, 7)
    chosen = order[:size]
    part = corrupt(images[chosen], family, 3, [ids[index] for index in chosen], 7)
    assert (part == whole[chosen]).all()


@pytest.mark.parametrize("family", DRAWN)
def test_draws_follow_from_seed_and_id(family):
    images = np.stack([picture(32)] * 2)
    first, second = corrupt(images, family, 3, ["a", "b"], 0)
    assert (first != second).any()
    assert (corrupt(images, family, 3, ["a", "b"], 1)[0] != first).any()
    assert (corrupt(images[:1], family, 3, ["a"], 0)[0] == first).all()


def test_a_path_has_one_direction_at_every_severity():
    """An image's draws do not depend on severity: only the length of its motion grows."""
    dot = np.zeros((1, 33, 33, 3), np.uint8)
    dot[0, 16, 16] = 255

    def angle(severity: int) -> float:
        y, x = np.nonzero(corrupt(dot, "motion_blur", severity, ["a"], 0)[0, :, :, 0] > 4)
        values, vectors = np.linalg.eigh(np.cov(x, y))
        return float(np.arctan2(*vectors[::-1, values.argmax()]) % np.pi)

    assert angle(5) == pytest.approx(angle(4), abs=0.3)


def test_impulses_and_flakes_stay_as_more_come():
    grey, black = np.full((1, 64, 64, 3), 128, np.uint8), np.zeros((1, 64, 64, 3), np.uint8)
    impulses = [corrupt(grey, "impulse_noise", severity, ["a"], 0) for severity in range(1, 6)]
    flakes = [corrupt(black, "snow", severity, ["a"], 0) for severity in range(1, 6)]
    for fewer, more in pairwise(impulses):
        assert (more[fewer != 128] == fewer[fewer != 128]).all()
    for fewer, more in pairwise(flakes):
        assert (more >= fewer).all()


def test_frost_is_thicker_at_the_rim_and_bluish():
    black = np.zeros((8, 64, 64, 3), np.uint8)
    ice = corrupt(black, "frost", 3, list("abcdefgh"), 0).mean(axis=0)
    middle = ice[16:48, 16:48].mean()
    assert ice.mean() > 1.2 * middle > 0
    red, green, blue = ice.mean(axis=(0, 1))
    assert red < green < blue


def test_a_zoom_keeps_the_middle_and_blurs_the_rim():
    stripes = np.zeros((1, 65, 65, 3), np.uint8)
    stripes[:, :, ::4] = stripes[:, :, 1::4] = 255
    zoomed = corrupt(stripes, "zoom_blur", 5, ["a"], 0)[0].astype(float)
    assert zoomed[:, 29:36].std() > 2 * zoomed[:, -7:].std()


def test_displacements_bring_in_nothing_from_outside():
    ramp = np.broadcast_to(np.linspace(50, 200, 32)[None, :, None], (1, 32, 32, 3)).astype(np.uint8)
    for family in ("glass_blur", "zoom_blur", "elastic_transform"):
        changed = corrupt(ramp, family, 5, ["a"], 0)
        assert changed.min() >= 50
        assert changed.max() <= 200


def test_blurs_and_blocks_keep_the_mean_and_a_flat_image():
    flat = np.full((1, 32, 32, 3), 90, np.uint8)
    for family in (
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "contrast",
        "elastic_transform",
        "pixelate",
    ):
        assert (corrupt(flat, family, 5, ["a"], 0) == 90).all()


def test_contrast_and_brightness_by_hand():
    two = np.zeros((1, 16, 16, 3), np.uint8)
    two[:, :, 8:] = 200
    low = corrupt(two, "contrast", 1, ["a"], 0)  # 0.7 of the distance to the mean, 100, is left
    assert set(np.unique(low)) == {30, 170}
    bright = corrupt(two, "brightness", 1, ["a"], 0)  # 0.1 of 255 is added
    assert set(np.unique(bright)) == {26, 226}  # 25.5 rounds to even


def test_noise_is_milder_on_small_images():
    small, large = (
        corrupt(picture(side)[None], "gaussian_noise", 3, ["a"], 0) for side in (32, 224)
    )
    assert distance(small[0], picture(32)) < 0.5 * distance(large[0], picture(224))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_and_wide_images_work(family):
    smallest = picture(16)
    for image in (smallest, np.tile(smallest, (1, 3, 1))):
        assert corrupt(image[None], family, 5, ["a"], 0).shape == (1, *image.shape)
