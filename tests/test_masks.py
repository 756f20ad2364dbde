"""Half masks: the four halves by hand, the seam by hand, and what always holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.mixing.masks import half_mask

SIDES = st.integers(1, 40)
third = 1 / 3

GOLDEN = {
    ("left", 4, 4, 0): [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]],
    ("right", 4, 4, 0): [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]],
    ("top", 4, 4, 0): [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
    ("bottom", 4, 4, 0): [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]],
    # A ramp of two pixels, both ends included, is 1, 0: the hard half.
    ("left", 4, 4, 2): [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]],
    ("right", 4, 4, 2): [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]],
    ("top", 4, 4, 2): [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
    ("bottom", 4, 4, 2): [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]],
    ("left", 4, 4, 4): [[1, 2 * third, third, 0]] * 4,
    ("right", 4, 4, 4): [[0, third, 2 * third, 1]] * 4,
    ("top", 4, 4, 4): [[1] * 4, [2 * third] * 4, [third] * 4, [0] * 4],
    ("bottom", 4, 4, 4): [[0] * 4, [third] * 4, [2 * third] * 4, [1] * 4],
    # Five high, four wide: the top half holds two rows, the bottom half three.
    ("left", 5, 4, 0): [[1, 1, 0, 0]] * 5,
    ("right", 5, 4, 0): [[0, 0, 1, 1]] * 5,
    ("top", 5, 4, 0): [[1] * 4, [1] * 4, [0] * 4, [0] * 4, [0] * 4],
    ("bottom", 5, 4, 0): [[0] * 4, [0] * 4, [1] * 4, [1] * 4, [1] * 4],
    ("top", 5, 4, 4): [[1] * 4, [2 * third] * 4, [third] * 4, [0] * 4, [0] * 4],
    ("bottom", 5, 4, 4): [[0] * 4, [third] * 4, [2 * third] * 4, [1] * 4, [1] * 4],
    # The flat parts on both sides of a ramp.
    ("left", 1, 8, 4): [[1, 1, 1, 2 * third, third, 0, 0, 0]],
}


def weights_of(mask):
    """Return the original's weights in whole numbers of 1 / unit: (H, W, 1)."""
    weights = np.zeros((*mask.shape, 1), np.uint16)
    weights[mask.kept] = mask.unit
    weights[mask.seam] = mask.ramp
    return weights


@pytest.mark.parametrize("arguments", GOLDEN, ids=str)
def test_mask_is_the_one_written_by_hand(arguments):
    mask = half_mask(*arguments)
    np.testing.assert_allclose(
        weights_of(mask)[..., 0] / mask.unit, GOLDEN[arguments], rtol=0, atol=1e-15
    )


@pytest.mark.parametrize(("first", "second"), [("left", "right"), ("top", "bottom")])
@given(height=SIDES, width=SIDES, half_seam=st.integers(0, 20))
def test_opposite_masks_are_complementary(first, second, height, width, half_seam):
    side = width if first == "left" else height
    seam = 2 * min(half_seam, side // 2)
    one, other = half_mask(first, height, width, seam), half_mask(second, height, width, seam)
    assert one.unit == other.unit
    assert one.shape == other.shape == (height, width)
    assert (weights_of(one) + weights_of(other) == one.unit).all()
    assert weights_of(one).max() <= one.unit


@given(height=SIDES, width=SIDES)
def test_hard_masks_are_binary_and_hold_half_of_the_side(height, width):
    left, bottom = half_mask("left", height, width), half_mask("bottom", height, width)
    assert left.unit == bottom.unit == 1
    assert set(np.unique(weights_of(left))) <= {0, 1}
    assert weights_of(left).sum() == height * (width // 2)
    assert weights_of(bottom).sum() == (height - height // 2) * width


def test_seam_wider_than_the_side_is_a_users_error():
    with pytest.raises(UserError, match=r"mixing.seam = 20 .* 16 px: set it to 16"):
        half_mask("left", 64, 16, 20)
    half_mask("top", 64, 16, 20)  # only the side that the seam crosses counts


def test_unknown_names_and_odd_seams_are_refused():
    with pytest.raises(ValueError, match="mask is 'diagonal'"):
        half_mask("diagonal", 4, 4)
    with pytest.raises(ValueError, match="seam is 3 px"):
        half_mask("left", 4, 4, 3)
