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
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional

from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.settings import Corruption

_REFERENCE_SIDE = 224
_SIZE_EXPONENT = 0.6
_CLOUD_WAVES = 12  # across the image, at most
_STRENGTHS: dict[Corruption, tuple[float, float, float, float, float]] = {
    "gaussian_noise": (0.08, 0.13, 0.19, 0.27, 0.38),  # standard deviation, of 1
    "shot_noise": (60, 25, 12, 6, 3),  # photons in a white pixel
    "defocus_blur": (2.5, 4, 5.5, 7.5, 10),  # radius of the disc, px
    "motion_blur": (7, 12, 18, 26, 36),  # length of the path, px
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

    `images` are uint8 (N, H, W, 3), `severity` is 1 (mild) to 5 (severe). One image's draws are the
    same at every severity, in any batch and in any order.
    """
    strength = _STRENGTHS[family][severity - 1]
    corrupted = np.empty_like(images)
    # One by one: in a batch, the last bits of a convolution would hang on its neighbours.
    for index, (image, image_id) in enumerate(zip(images, ids, strict=True)):
        generator = torch.Generator().manual_seed(seed_from(seed, "corruption", family, image_id))
        pixels = torch.tensor(image).permute(2, 0, 1) / 255
        changed = _FAMILIES[family](pixels, strength, generator)
        corrupted[index] = _to_uint8(changed)
    return corrupted


def _to_uint8(pixels: Tensor) -> np.ndarray:
    return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _scale(pixels: Tensor) -> float:
    """Return how strong a corruption with a unit of length is at this size: 1 at 224 px."""
    return (min(pixels.shape[1:]) / _REFERENCE_SIDE) ** _SIZE_EXPONENT


def _gaussian_noise(pixels: Tensor, deviation: float, generator: Generator) -> Tensor:
    return pixels + deviation * _scale(pixels) * torch.randn(pixels.shape, generator=generator)


def _shot_noise(pixels: Tensor, photons: float, generator: Generator) -> Tensor:
    photons /= _scale(pixels) ** 2  # the noise of n photons is 1 / sqrt(n)
    return torch.poisson(pixels * photons, generator=generator) / photons


def _defocus_blur(pixels: Tensor, radius: float, generator: Generator) -> Tensor:
    radius *= _scale(pixels)
    reach = int(radius + 1)
    across = torch.arange(-reach, reach + 1.0)
    distance = torch.hypot(across[:, None], across[None, :])
    soft_rimmed = (radius + 0.5 - distance).clamp(0, 1)  # so that parts of a pixel count
    return _filter(pixels, soft_rimmed)


def _motion_blur(pixels: Tensor, length: float, generator: Generator) -> Tensor:
    length *= _scale(pixels)
    angle = torch.pi * torch.rand((), generator=generator)
    reach = int(length / 2 + 1)
    along = torch.linspace(-length / 2, length / 2, 16 * reach)
    across = torch.arange(-reach, reach + 1.0)
    # Each point of the path falls on the four pixels around it, in proportion to how near they are.
    rows = (1 - (along * torch.sin(angle) - across[:, None]).abs()).clamp(min=0)
    columns = (1 - (along * torch.cos(angle) - across[:, None]).abs()).clamp(min=0)
    return _filter(pixels, rows @ columns.T)


def _filter(pixels: Tensor, kernel: Tensor) -> Tensor:
    reach = kernel.shape[0] // 2
    padded = functional.pad(pixels[:, None], [reach] * 4, mode="reflect")
    return functional.conv2d(padded, (kernel / kernel.sum())[None, None])[:, 0]


def _fog(pixels: Tensor, depth: float, generator: Generator) -> Tensor:
    """Fade towards bright grey by Koschmieder's law, through clouds of the given mean depth."""
    airlight = 0.9
    left = torch.exp(-depth * (0.4 + 1.2 * _clouds(pixels.shape[1:], generator)))
    return pixels * left + airlight * (1 - left)


def _clouds(shape: Sequence[int], generator: Generator) -> Tensor:
    """Return clouds in [0, 1], (H, W), alike at every size: waves, the longer the higher."""
    height, width = shape
    across = torch.arange(-_CLOUD_WAVES, _CLOUD_WAVES + 1.0)
    waves = torch.hypot(across[:, None], across[None, :])
    amplitude = torch.where(waves > 0, waves.clamp(min=1) ** -1.8, 0)
    real, imaginary = torch.randn((2, *waves.shape), generator=generator) * amplitude
    rows = torch.exp(2j * torch.pi * across * torch.arange(height)[:, None] / height)
    columns = torch.exp(2j * torch.pi * across * torch.arange(width)[:, None] / width)
    field = (rows @ torch.complex(real, imaginary) @ columns.T).real
    return (field - field.min()) / (field.max() - field.min())


def _brightness(pixels: Tensor, added: float, generator: Generator) -> Tensor:
    """Raise the value of HSV; hue and saturation stay, and black becomes grey."""
    value = pixels.amax(dim=0, keepdim=True)
    raised = (value + added).clamp(max=1)
    return torch.where(value > 0, pixels * raised / value.clamp(min=1 / 255), raised)


def _contrast(pixels: Tensor, left: float, generator: Generator) -> Tensor:
    mean = pixels.mean(dim=(1, 2), keepdim=True)
    return mean + left * (pixels - mean)


def _pixelate(pixels: Tensor, block: float, generator: Generator) -> Tensor:
    block = 1 + (block - 1) * _scale(pixels)
    sides = pixels.shape[1:]
    small = functional.interpolate(
        pixels[None], [round(side / block) for side in sides], mode="area"
    )
    return functional.interpolate(small, sides, mode="nearest-exact")[0]


def _jpeg_compression(pixels: Tensor, factor: float, generator: Generator) -> Tensor:
    """Compress with quantisation tables of about `factor` times libjpeg's (its quality 50)."""
    factor *= _scale(pixels)
    quality = 50 / factor if factor > 1 else 100 - 50 * factor
    buffer = io.BytesIO()
    Image.fromarray(_to_uint8(pixels)).save(buffer, "JPEG", quality=round(quality))
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255


_FAMILIES: dict[Corruption, Callable[[Tensor, float, Generator], Tensor]] = {
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
