"""The two equations: the hybrid of an original with its edit, and its blend with a fractal.

What belongs here: arithmetic on arrays. What does not: drawing masks, fractals and lambda.
"""

import numpy as np
from numpy.typing import NDArray

# Rounds half up in spite of float32: an exact half may come out some 1e-5 short of it.
_HALF = np.float32(0.5 + 2**-12)
# Bands of rows keep the float32 working set in the processor's cache, which halves the time.
_ROWS = 32

Image = NDArray[np.uint8]
Mask = NDArray[np.float32]


def hybrid(original: Image, edit: Image, mask: Mask) -> Image:
    """Return H = M I + (1 - M) G, rounded to nearest (half up): uint8 (H, W, 3).

    `original` I and `edit` G: uint8 (H, W, 3). `mask` M: float32 (H, W) in [0, 1], the weight of
    the original. Paper, figure 2 and the equation of the hybrid image.

    Raises ValueError where shapes or dtypes do not match.
    """
    _check(mask, original=original, edit=edit)
    result = np.empty_like(original)
    for rows in _bands(len(original)):
        result[rows] = _rounded(_joined(original[rows], edit[rows], mask[rows]))
    return result


def mix(original: Image, edit: Image, mask: Mask, fractal: Image, lam: float) -> Image:
    """Return A = (1 - lam) (M I + (1 - M) G) + lam F, rounded to nearest (half up).

    The result is uint8 (H, W, 3), joined and blended in one pass: nothing is rounded on the way.
    `original` I, `edit` G and `fractal` F: uint8 (H, W, 3). `mask` M: float32 (H, W) in [0, 1], the
    weight of the original. `lam` in [0, 1], the weight of the fractal. Paper, the equation of the
    augmented image.

    Raises ValueError where shapes or dtypes do not match or `lam` is out of range.
    """
    _check(mask, original=original, edit=edit, fractal=fractal)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}; it must lie in [0, 1]")
    result = np.empty_like(original)
    for rows in _bands(len(original)):
        blend = _joined(original[rows], edit[rows], mask[rows])
        blend *= np.float32(1 - lam)
        blend += np.float32(lam) * fractal[rows]
        result[rows] = _rounded(blend)
    return result


def _joined(original: Image, edit: Image, mask: Mask) -> NDArray[np.float32]:
    joined = np.subtract(original, edit, dtype=np.float32)
    joined *= mask[..., None]
    joined += edit
    return joined


def _rounded(values: NDArray[np.float32]) -> Image:
    values += _HALF
    return values.astype(np.uint8)


def _bands(height: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, height, _ROWS)]


def _check(mask: Mask, **images: Image) -> None:
    if mask.ndim != 2 or mask.dtype != np.float32:
        raise ValueError(f"mask is {mask.dtype} {mask.shape}; it must be float32 (H, W)")
    for name, image in images.items():
        if image.dtype != np.uint8 or image.shape != (*mask.shape, 3):
            raise ValueError(
                f"{name} is {image.dtype} {image.shape}; it must be uint8 {(*mask.shape, 3)}"
            )
