"""The two equations: the hybrid of an original with its edit, and its blend with a fractal.

What belongs here: arithmetic on arrays. What does not: drawing masks, fractals and lambda.

The weights are fractions, so whole numbers give the result exactly, and faster than floats: numpy
multiplies, adds and divides 16-bit integers with the processor's vector instructions.
"""

from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from diffusemix_pipeline.mixing.masks import Mask

# Of all weights together: 256 of its levels, the last one rounded up, fill 32 bits.
_LARGEST_UNIT = 2**24
# Values of an image worked on at a time: as 16-bit integers they stay in the processor's cache, and
# below the 128 KiB from which the allocator asks the kernel for new pages each time.
_BAND = 48 * 1024

Image = NDArray[np.uint8]
Sum = NDArray[np.unsignedinteger]


def hybrid(original: Image, edit: Image, mask: Mask) -> Image:
    """Return H = M I + (1 - M) G, rounded to nearest (half up): uint8 (H, W, 3).

    `original` I and `edit` G: uint8 (H, W, 3). `mask` M: the weight of the original, of the same
    shape. Paper, figure 2 and the equation of the hybrid image.

    Raises ValueError where shapes or dtypes do not match.
    """
    _check(mask, original=original, edit=edit)
    result = np.empty_like(original)
    for rows in _bands(result):
        total = _joined(original[rows], edit[rows], mask.weight[rows], mask.unit, mask.unit)
        result[rows] = _rounded(total, mask.unit)
    return result


def mix(original: Image, edit: Image, mask: Mask, fractal: Image, lam: float) -> Image:
    """Return A = (1 - lam) (M I + (1 - M) G) + lam F, rounded to nearest (half up).

    The result is uint8 (H, W, 3), joined and blended in one pass: nothing is rounded on the way.
    `original` I, `edit` G and `fractal` F: uint8 (H, W, 3). `mask` M: the weight of the original,
    of the same shape. `lam` in [0, 1], the weight of the fractal, counts as the nearest fraction
    p / q with q <= 2**24 / mask.unit: 0.2 is 1 / 5. Paper, the equation of the augmented image.

    Raises ValueError where shapes or dtypes do not match or `lam` is out of range.
    """
    _check(mask, original=original, edit=edit, fractal=fractal)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}; it must lie in [0, 1]")
    p, q = _fraction(lam, _LARGEST_UNIT // mask.unit)
    unit = mask.unit * q
    result = np.empty_like(original)
    for rows in _bands(result):
        total = _joined(original[rows], edit[rows], mask.weight[rows], mask.unit, unit)
        total *= total.dtype.type(q - p)
        total += np.multiply(fractal[rows], total.dtype.type(mask.unit * p), dtype=total.dtype)
        result[rows] = _rounded(total, unit)
    return result


@lru_cache
def _fraction(value: float, largest: int) -> tuple[int, int]:
    return Fraction(value).limit_denominator(largest).as_integer_ratio()


def _bands(image: Image) -> Iterator[slice]:
    height, width, channels = image.shape
    step = max(_BAND // max(width * channels, 1), 1)
    return (slice(start, start + step) for start in range(0, height, step))


def _joined(
    original: Image, edit: Image, weight: NDArray[np.uint16], mask_unit: int, unit: int
) -> Sum:
    """Return mask_unit H, in a type that holds `unit` H."""
    dtype = np.uint16 if unit <= 256 else np.uint32
    joined = np.subtract(original, edit, dtype=dtype)  # may wrap around; adding the edit mends it
    joined *= weight
    joined += np.multiply(edit, dtype(mask_unit), dtype=dtype)
    return joined


def _rounded(total: Sum, unit: int) -> Sum:
    """Return total / unit, half up, in the place of `total`."""
    total += total.dtype.type(unit // 2)
    total //= total.dtype.type(unit)
    return total


def _check(mask: Mask, **images: Image) -> None:
    shape = mask.weight.shape
    if len(shape) != 3 or shape[2] != 3 or mask.weight.dtype != np.uint16:
        raise ValueError(f"mask is {mask.weight.dtype} {shape}; it must be uint16 (H, W, 3)")
    for name, image in images.items():
        if image.dtype != np.uint8 or image.shape != shape:
            raise ValueError(f"{name} is {image.dtype} {image.shape}; it must be uint8 {shape}")
