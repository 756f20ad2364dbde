"""Common corruptions: the families of ImageNet-C, seeded, and right at any image size.

The families and the five severities follow Hendrycks and Dietterich, Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations (2019). The constants and the code are ours, so
numbers from here cannot be compared with a published mCE.

`_STRENGTHS` holds what each severity means at 224 px. A blur, a noise or a block that is fair at
224 px would wipe out a 32 px image, in which one pixel stands for so much more of the scene. Such
strengths shrink with `_scale`, the side over 224 to a power below one: a scene of fewer pixels
loses less of each, though more than its share. Contrast, brightness and fog have no unit of length
and stay as they are.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from PIL import Image

from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.settings import Corruption

_REFERENCE_SIDE = 224
_SIZE_EXPONENT = 0.6
_CLOUD_WAVES = 12  # across the image, at most
_STRENGTHS: dict[Corruption, tuple[float, float, float, float, float]] = {
    "gaussian_noise": (0.08, 0.13, 0.19, 0.27, 0.38),  # standard deviation, of 1
    "shot_noise": (60, 25, 12, 6, 3),  # photons in a white pixel
    "defocus_blur": (2.5, 4, 5.5, 7.5, 10),  # radius of the disc, px
    "motion_blur": (6, 10, 15, 21, 28),  # length of the path, px
    "fog": (0.25, 0.5, 0.8, 1.2, 1.7),  # mean optical depth
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value of HSV, of 1
    "contrast": (0.7, 0.5, 0.35, 0.22, 0.13),  # what is left of it
    "pixelate": (1.6, 2.1, 2.7, 3.4, 4.2),  # side of a block, px
    "jpeg_compression": (1.7, 2.5, 3.6, 5.2, 7.5),  # factor on the quantisation tables
}


def corrupt(
    images: np.ndarray, family: Corruption, severity: int, ids: Sequence[str], seed: int
) -> np.ndarray:
    """Return uint8 (N, H, W, 3) images, each corrupted as (seed, family, its id) determine.

    `images` are uint8 (N, H, W, 3), `severity` is 1 (mild) to 5 (severe). An image's draws are the
    same at every severity, in any batch and in any order.
    """
    strength = _STRENGTHS[family][severity - 1]
    corrupted = np.empty_like(images)
    for index, (image, image_id) in enumerate(zip(images, ids, strict=True)):
        generator = np.random.default_rng(seed_from(seed, "corruption", family, image_id))
        pixels = image.astype(np.float32) / 255
        corrupted[index] = _to_uint8(_FAMILIES[family](pixels, strength, generator))
    return corrupted


# Each family takes float32 (H, W, 3) pixels in [0, 1], its strength and its draws, and gives such
# pixels, which may leave [0, 1].


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def _scale(pixels: np.ndarray) -> float:
    """Return how strong a corruption with a unit of length is at this size: 1 at 224 px."""
    return (min(pixels.shape[:2]) / _REFERENCE_SIDE) ** _SIZE_EXPONENT


def _gaussian_noise(pixels: np.ndarray, deviation: float, generator: Generator) -> np.ndarray:
    noise = generator.standard_normal(pixels.shape, dtype=np.float32)
    return pixels + deviation * _scale(pixels) * noise


def _shot_noise(pixels: np.ndarray, photons: float, generator: Generator) -> np.ndarray:
    photons /= _scale(pixels) ** 2  # the noise of n photons is 1 / sqrt(n)
    return generator.poisson(pixels * photons) / photons


def _defocus_blur(pixels: np.ndarray, radius: float, generator: Generator) -> np.ndarray:
    radius *= _scale(pixels)
    across = np.arange(-int(radius + 1), int(radius + 1) + 1)
    distance = np.hypot(across[:, None], across)
    soft_rimmed = (radius + 0.5 - distance).clip(0, 1)  # so that parts of a pixel count
    return _filtered(pixels, soft_rimmed)


def _motion_blur(pixels: np.ndarray, length: float, generator: Generator) -> np.ndarray:
    length *= _scale(pixels)
    angle = np.pi * generator.random()
    reach = int(length / 2 + 1)
    along = np.linspace(-length / 2, length / 2, 16 * reach)
    across = np.arange(-reach, reach + 1)[:, None]
    # Each point of the path falls on the four pixels around it, in proportion to how near they are.
    rows = (1 - np.abs(along * np.sin(angle) - across)).clip(0)
    columns = (1 - np.abs(along * np.cos(angle) - across)).clip(0)
    return _filtered(pixels, rows @ columns.T)


def _filtered(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve with a kernel of odd sides, through Fourier space, reflecting at the rim."""
    reach = kernel.shape[0] // 2
    padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    sides = padded.shape[:2]
    transfer = np.fft.rfft2(kernel / kernel.sum(), sides)[..., None]
    whole = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * transfer, sides, axes=(0, 1))
    return whole[2 * reach :, 2 * reach :]


def _fog(pixels: np.ndarray, depth: float, generator: Generator) -> np.ndarray:
    """Fade towards bright grey by Koschmieder's law, through clouds of the given mean depth."""
    airlight = 0.9
    left = np.exp(-depth * (0.4 + 1.2 * _clouds(pixels.shape[:2], generator)))[..., None]
    return pixels * left + airlight * (1 - left)


def _clouds(shape: Sequence[int], generator: Generator) -> np.ndarray:
    """Return clouds in [0, 1], (H, W), alike at every size: waves, the longer the higher."""
    height, width = shape
    across = np.arange(-_CLOUD_WAVES, _CLOUD_WAVES + 1)
    waves = np.hypot(across[:, None], across)
    amplitude = np.where(waves > 0, waves.clip(1) ** -1.8, 0)
    real, imaginary = generator.standard_normal((2, *waves.shape)) * amplitude
    rows = np.exp(2j * np.pi * across * np.arange(height)[:, None] / height)
    columns = np.exp(2j * np.pi * across * np.arange(width)[:, None] / width)
    field = (rows @ (real + 1j * imaginary) @ columns.T).real
    return (field - field.min()) / (field.max() - field.min())


def _brightness(pixels: np.ndarray, added: float, generator: Generator) -> np.ndarray:
    """Raise the value of HSV; hue and saturation stay, and black becomes grey."""
    value = pixels.max(axis=2, keepdims=True)
    raised = (value + added).clip(max=1)
    return np.where(value > 0, pixels * raised / value.clip(1 / 255), raised)


def _contrast(pixels: np.ndarray, left: float, generator: Generator) -> np.ndarray:
    mean = pixels.mean(axis=(0, 1))
    return mean + left * (pixels - mean)


def _pixelate(pixels: np.ndarray, block: float, generator: Generator) -> np.ndarray:
    block = 1 + (block - 1) * _scale(pixels)
    rows, columns = (_block_means(side, block) for side in pixels.shape[:2])
    down = np.tensordot(rows, pixels, axes=(1, 0))
    return np.tensordot(columns, down, axes=(1, 1)).swapaxes(0, 1)


def _block_means(side: int, block: float) -> np.ndarray:
    """Return (side, side): what takes a line of pixels to the means of its blocks of `block` px.

    A pixel across the border of two blocks gets part of each, so that blocks of any length go.
    """
    edges = np.clip(np.arange(np.ceil(side / block) + 1) * block, 0, side)
    pixel = np.arange(side)
    covered = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    covered = covered.clip(0)
    return (covered.T @ (covered / np.diff(edges)[:, None])).astype(np.float32)


def _jpeg_compression(pixels: np.ndarray, factor: float, generator: Generator) -> np.ndarray:
    """Compress with quantisation tables of about `factor` times libjpeg's (its quality 50)."""
    factor *= _scale(pixels)
    quality = 50 / factor if factor > 1 else 100 - 50 * factor
    buffer = io.BytesIO()
    Image.fromarray(_to_uint8(pixels)).save(buffer, "JPEG", quality=round(quality))
    return np.asarray(Image.open(buffer)) / 255


_FAMILIES: dict[Corruption, Callable[[np.ndarray, float, Generator], np.ndarray]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "defocus_blur": _defocus_blur,
    "motion_blur": _motion_blur,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
