"""Half masks: which pixels of the hybrid come from the original, and which from its edit.

What belongs here: the weight M of the original. What does not: drawing which mask an image gets,
and applying it (`blending`).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusemix_pipeline.errors import UserError

_ALL = slice(None)


class Mask(NamedTuple):
    """The weight M of the original in H = M I + (1 - M) G: one, a ramp, and zero elsewhere."""

    shape: tuple[int, int]
    """Height and width in px."""
    kept: tuple[slice, slice]
    """The rows and columns where the weight is one."""
    seam: tuple[slice, slice]
    """The rows and columns of the ramp; none where the mask is binary."""
    ramp: NDArray[np.uint16]
    """(rows, 1, 1) or (1, columns, 1): the weights there, in whole numbers of 1 / unit."""
    unit: int


def half_mask(name: str, height: int, width: int, seam: int = 0) -> Mask:
    """Return the mask of an original that keeps one half, for images of (height, width, 3).

    `name` (left, right, top, bottom) is the half that stays the original. The left and the top half
    hold side // 2 px, the right and the bottom half the rest: opposite masks always sum to one.
    With seam 0 the mask is binary (paper, figure 2). An even `seam` > 0 puts a linear ramp of that
    many px on the middle, both ends included, as the authors' code does: a ramp of 2 px is 1, 0.

    Raises UserError if the seam is wider than the side that it crosses, ValueError for another name
    or an odd seam.
    """
    if name not in ("left", "right", "top", "bottom"):
        raise ValueError(f"mask is {name!r}; it must be left, right, top or bottom")
    if seam < 0 or seam % 2:
        raise ValueError(f"seam is {seam} px; it must be even and not negative")
    upright = name in ("left", "right")
    side = width if upright else height
    if seam > side:
        raise UserError(
            f"mixing.seam = {seam} is wider than the image's side of {side} px: "
            f"set it to {side - side % 2} or less."
        )
    first = name in ("left", "top")
    start = side // 2 - seam // 2
    unit = max(seam - 1, 1)
    ramp = np.arange(seam, dtype=np.uint16)
    kept = slice(0, start) if first else slice(start + seam, side)
    crossed = slice(start, start + seam)
    weights = ramp[::-1] if first else ramp
    if upright:
        return Mask((height, width), (_ALL, kept), (_ALL, crossed), weights[None, :, None], unit)
    return Mask((height, width), (kept, _ALL), (crossed, _ALL), weights[:, None, None], unit)
