"""The two equations: goldens worked out by hand on 4 x 4 pixels, and what always holds."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_masks import weights_of

from diffusemix_pipeline.mixing.blending import hybrid, mix
from diffusemix_pipeline.mixing.masks import Mask, half_mask

SIDES = st.integers(1, 12)
LAMS = st.floats(0, 1, width=32)


def rgb(red, green, blue):
    return np.stack([np.array(channel, np.uint8) for channel in (red, green, blue)], axis=-1)


def mask_of(weights, unit=1):
    """Return any mask: one whose ramp is everywhere."""
    ramp = np.array(weights, np.uint16)[..., None]
    everywhere, nowhere = (slice(None), slice(None)), (slice(0), slice(0))
    return Mask(ramp.shape[:2], nowhere, everywhere, ramp, unit)


ORIGINAL = rgb(
    [[0, 11, 20, 30], [41, 52, 60, 70], [83, 90, 100, 110], [121, 129, 140, 150]],
    [[255] * 4] * 4,
    [[0] * 4] * 4,
)
EDIT = rgb(
    [[255, 245, 236, 227], [215, 205, 197, 186], [175, 165, 154, 145], [135, 125, 113, 105]],
    [[0] * 4] * 4,
    [[100] * 4] * 4,
)
FRACTAL = rgb([[5] * 4, [10] * 4, [100] * 4, [255] * 4], [[128] * 4] * 4, [[255] * 4] * 4)
LEFT = mask_of([[1, 1, 0, 0]] * 4)
TOP = mask_of([[1] * 4, [1] * 4, [0] * 4, [0] * 4])
SOFT_LEFT = mask_of([[3, 2, 1, 0]] * 4, 3)

GOLDEN_MIXES = {
    "left, lam 0.2": (
        (LEFT, 0.2),
        [[1, 10, 190, 183], [35, 44, 160, 151], [86, 92, 143, 136], [148, 154, 141, 135]],
        [[230, 230, 26, 26]] * 4,
        [[51, 51, 131, 131]] * 4,
    ),
    "top, lam 0.5": (
        (TOP, 0.5),
        [[3, 8, 13, 18], [26, 31, 35, 40], [138, 133, 127, 123], [195, 190, 184, 180]],
        [[192] * 4, [192] * 4, [64] * 4, [64] * 4],
        [[128] * 4, [128] * 4, [178] * 4, [178] * 4],
    ),
    "left with a seam, lam 0.2": (
        (SOFT_LEFT, 0.2),
        [[1, 72, 132, 183], [35, 84, 123, 151], [86, 112, 129, 136], [148, 153, 149, 135]],
        [[230, 162, 94, 26]] * 4,
        [[51, 78, 104, 131]] * 4,
    ),
}


@pytest.mark.parametrize("name", GOLDEN_MIXES)
def test_mix_is_the_one_worked_out_by_hand(name):
    (mask, lam), *expected = GOLDEN_MIXES[name]
    np.testing.assert_array_equal(mix(ORIGINAL, EDIT, mask, FRACTAL, lam), rgb(*expected))


def test_hybrid_is_the_one_worked_out_by_hand():
    expected = rgb(
        [[0, 89, 164, 227], [41, 103, 151, 186], [83, 115, 136, 145], [121, 128, 122, 105]],
        [[255, 170, 85, 0]] * 4,
        [[0, 33, 67, 100]] * 4,
    )
    np.testing.assert_array_equal(hybrid(ORIGINAL, EDIT, SOFT_LEFT), expected)


@pytest.mark.parametrize(
    ("value", "lam", "expected"), [(5, 0.1, 5), (15, 0.1, 14), (50, 0.35, 33), (10, 0.25, 8)]
)
def test_exact_halves_go_up(value, lam, expected):
    """4.5, 13.5, 32.5 and 7.5: float32 puts some of them just below the half."""
    black = np.zeros((4, 4, 3), np.uint8)
    mixed = mix(np.full_like(black, value), black, mask_of([[1] * 4] * 4), black, lam)
    assert (mixed == expected).all()


@st.composite
def scenes(draw):
    """Return original, edit, fractal and a mask of one random size."""
    height, width = draw(SIDES), draw(SIDES)
    image = arrays.arrays(np.uint8, (height, width, 3))
    unit = draw(st.integers(1, 99))
    weights = draw(arrays.arrays(np.uint16, (height, width), elements=st.integers(0, unit)))
    return draw(image), draw(image), draw(image), mask_of(weights, unit)


@given(scenes(), LAMS)
def test_mix_agrees_with_the_equation_in_float64(scene, lam):
    original, edit, fractal, mask = scene
    weight = mask.ramp / mask.unit
    exact = (1 - lam) * (weight * original + (1 - weight) * edit) + lam * fractal
    mixed = mix(original, edit, mask, fractal, lam)
    assert mixed.dtype == np.uint8
    assert np.abs(mixed - exact).max() <= 0.501


@given(scenes(), st.integers(0, 1000).map(lambda lam: Fraction(lam, 1000)))
def test_mix_is_exactly_the_equation_rounded_half_up(scene, lam):
    original, edit, fractal, mask = scene
    weight, unit = mask.ramp.astype(object), mask.unit
    hybrids = (weight * original + (unit - weight) * edit) * Fraction(1, unit)
    exact = (1 - lam) * hybrids + lam * fractal
    mixed = mix(original, edit, mask, fractal, float(lam))
    np.testing.assert_array_equal(mixed, (exact + Fraction(1, 2)) // 1)


@pytest.mark.parametrize("hundredths", range(101))
def test_every_pair_of_levels_is_blended_exactly(hundredths):
    """All of 256 x 256, in whole numbers: (100 - h) I + h F hundredths, half up."""
    levels = np.arange(256, dtype=np.uint8)
    original, fractal = (np.stack([level] * 3, axis=-1) for level in np.meshgrid(levels, levels))
    whole = (100 - hundredths) * original.astype(int) + hundredths * fractal.astype(int)
    mixed = mix(original, fractal, mask_of(np.ones((256, 256))), fractal, hundredths / 100)
    np.testing.assert_array_equal(mixed, (whole + 50) // 100)


@pytest.mark.parametrize("seam", [0, 2, 20])
def test_every_pair_of_levels_is_joined_exactly(seam):
    """All of 256 x 256 at every step of the ramp, blended with the lightest fractal."""
    unit = max(seam - 1, 1)
    original, edit = (np.stack([level] * 3, -1) for level in np.meshgrid(*[np.arange(256)] * 2))
    images = original.astype(np.uint8), edit.astype(np.uint8)
    for weight in range(unit + 1):
        mask = mask_of(np.full((256, 256), weight), unit)
        whole = weight * original + (unit - weight) * edit
        np.testing.assert_array_equal(hybrid(*images, mask), (2 * whole + unit) // (2 * unit))
        mixed = mix(*images, mask, np.full_like(images[0], 255), 0.2)
        whole = 4 * whole + 255 * unit
        np.testing.assert_array_equal(mixed, (2 * whole + 5 * unit) // (10 * unit))


@given(scenes(), LAMS)
def test_ends_of_lambda_and_of_the_mask(scene, lam):
    original, edit, fractal, mask = scene
    ones, none = (mask_of(np.full(original.shape[:2], weight)) for weight in (1, 0))
    np.testing.assert_array_equal(
        mix(original, edit, mask, fractal, 0), hybrid(original, edit, mask)
    )
    np.testing.assert_array_equal(mix(original, edit, mask, fractal, 1), fractal)
    np.testing.assert_array_equal(mix(original, edit, ones, fractal, 0), original)
    np.testing.assert_array_equal(hybrid(original, edit, ones), original)
    np.testing.assert_array_equal(hybrid(original, edit, none), edit)
    np.testing.assert_array_equal(mix(original, original, mask, original, lam), original)


@given(scenes())
def test_inputs_are_left_as_they_were(scene):
    original, edit, fractal, mask = scene
    arrays_in = [original, edit, fractal, mask.ramp]
    before = [array.copy() for array in arrays_in]
    mix(original, edit, mask, fractal, 0.2)
    for array, copy in zip(arrays_in, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@given(scenes(), st.sampled_from(["left", "right", "top", "bottom"]), st.integers(0, 6), LAMS)
def test_a_half_mask_counts_by_its_weights(scene, name, half_seam, lam):
    original, edit, fractal, _ = scene
    height, width = original.shape[:2]
    seam = 2 * min(half_seam, (width if name in ("left", "right") else height) // 2)
    half = half_mask(name, height, width, seam)
    same = mask_of(weights_of(half)[..., 0], half.unit)
    np.testing.assert_array_equal(hybrid(original, edit, half), hybrid(original, edit, same))
    np.testing.assert_array_equal(
        mix(original, edit, half, fractal, lam), mix(original, edit, same, fractal, lam)
    )


def test_large_images_are_joined_and_blended_in_every_row():
    """Larger than the bands that the arithmetic walks, and no multiple of them."""
    rng = np.random.default_rng(0)
    original, edit, fractal = rng.integers(0, 256, (3, 275, 109, 3), dtype=np.uint8)
    joined = hybrid(original, edit, half_mask("top", 275, 109))
    np.testing.assert_array_equal(joined, np.concatenate([original[:137], edit[137:]]))
    mixed = mix(original, edit, half_mask("top", 275, 109), fractal, 0.2)
    np.testing.assert_array_equal(mixed, (4 * joined.astype(int) + fractal + 2) // 5)


def test_mismatched_inputs_are_refused():
    with pytest.raises(ValueError, match=r"edit is uint8 \(4, 3, 3\)"):
        mix(ORIGINAL, EDIT[:, :3], LEFT, FRACTAL, 0.2)
    with pytest.raises(ValueError, match="fractal is float32"):
        mix(ORIGINAL, EDIT, LEFT, FRACTAL.astype(np.float32), 0.2)
    with pytest.raises(ValueError, match=r"original is .* it must be uint8 \(4, 5, 3\)"):
        hybrid(ORIGINAL, EDIT, half_mask("left", 4, 5))
    with pytest.raises(ValueError, match=r"lam is 1.5"):
        mix(ORIGINAL, EDIT, LEFT, FRACTAL, 1.5)
