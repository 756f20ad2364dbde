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

    `original` I and `edit` G: uint8 (H, W, 3). `mask` M: the weight of the original.
    Paper, figure 2 and the equation of the hybrid image.

    Raises ValueError where shapes or dtypes do not match.
    """
    _check(mask, original=original, edit=edit)
    return _rounded(_joined(original, edit, mask), mask.unit).astype(np.uint8, copy=False)


def mix(original: Image, edit: Image, mask: Mask, fractal: Image, lam: float) -> Image:
    """Return A = (1 - lam) (M I + (1 - M) G) + lam F, rounded to nearest (half up).

    The result is uint8 (H, W, 3), joined and blended in one pass: nothing is rounded on the way.
    `original` I, `edit` G and `fractal` F: uint8 (H, W, 3). `mask` M: the weight of the original.
    `lam` in [0, 1], the weight of the fractal, counts as the nearest fraction
    p / q with q <= 2**24 / mask.unit: 0.2 is 1 / 5. Paper, the equation of the augmented image.

    Raises ValueError where shapes or dtypes do not match or `lam` is out of range.
    """
    _check(mask, original=original, edit=edit, fractal=fractal)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}; it must lie in [0, 1]")
    p, q = _fraction(lam, _LARGEST_UNIT // mask.unit)
    unit = mask.unit * q
    dtype = _holding(unit)
    joined = _joined(original, edit, mask)
    result = joined if joined.dtype == np.uint8 else np.empty_like(original)
    for rows in _bands(result):
        total = np.multiply(joined[rows], dtype.type(q - p), dtype=dtype)
        total += np.multiply(fractal[rows], dtype.type(mask.unit * p), dtype=dtype)
        result[rows] = _rounded(total, unit)
    return result


@lru_cache
def _fraction(value: float, largest: int) -> tuple[int, int]:
    return Fraction(value).limit_denominator(largest).as_integer_ratio()


def _bands(image: Image) -> Iterator[slice]:
    height, width, channels = image.shape
    step = max(_BAND // max(width * channels, 1), 1)
    return (slice(start, start + step) for start in range(0, height, step))


def _joined(original: Image, edit: Image, mask: Mask) -> Sum:
    """Return mask.unit H."""
    dtype = _holding(mask.unit)
    unit = dtype.type(mask.unit)
    joined = np.multiply(edit, unit, dtype=dtype)
    joined[mask.kept] = np.multiply(original[mask.kept], unit, dtype=dtype)
    # The difference may wrap around; adding it to the edit mends that.
    joined[mask.seam] += np.subtract(original[mask.seam], edit[mask.seam], dtype=dtype) * mask.ramp
    return joined


def _holding(unit: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest type for sums of levels of 1 / unit, half a level added to round."""
    return np.min_scalar_type(255 * unit + unit // 2)


def _rounded(total: Sum, unit: int) -> Sum:
    """Return total / unit, half up, in the place of `total`."""
    if unit > 1:
        total += total.dtype.type(unit // 2)
        total //= total.dtype.type(unit)
    return total


def _check(mask: Mask, **images: Image) -> None:
    shape = (*mask.shape, 3)
    for name, image in images.items():
        if image.dtype != np.uint8 or image.shape != shape:
            raise ValueError(f"{name} is {image.dtype} {image.shape}; it must be uint8 {shape}")
