"""Common corruptions: the families of ImageNet-C, seeded, and right at any image size.

The families and the five severities follow Hendrycks and Dietterich, Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations (2019). The constants and the code are ours, so
numbers from here cannot be compared with a published mCE.

`_STRENGTHS` holds what each severity means at 224 px. A blur, a noise or a block that is fair at
224 px would wipe out a 32 px image, in which one pixel stands for so much more of the scene. Such
strengths shrink with `_scale`, the side over 224 to a power below one: a scene of fewer pixels
loses less of each, though more than its share. Contrast, brightness and what fog, frost and snow
hide have no unit of length and stay as they are; only the flakes and ferns themselves shrink.
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
_MOST_IMPULSES = 0.6  # of all values
_CLOUD_WAVES = 12  # across the image, at most
_ZOOM_DOUBLINGS = 6  # 64 exposures, less than a pixel apart at 224 px
_FLAKES = ((0.7, 1.1), (1.2, 2), (2.2, 3.6))  # deviations across and along their fall, px
_FERNS = 32
_FERN_GRAIN = 2.2  # width of a stem, and from branch to branch, px
_ELASTIC_GRAIN = 9  # deviation of the bell that smooths displacements, px
_STRENGTHS: dict[Corruption, tuple[float, float, float, float, float]] = {
    "gaussian_noise": (0.08, 0.13, 0.19, 0.27, 0.38),  # standard deviation, of 1
    "shot_noise": (60, 25, 12, 6, 3),  # photons in a white pixel
    "impulse_noise": (0.03, 0.07, 0.12, 0.19, 0.28),  # share of the values that are lost
    "defocus_blur": (2.5, 4, 5.5, 7.5, 10),  # radius of the disc, px
    "glass_blur": (1.5, 2.3, 3.4, 4.8, 6.5),  # how far a point may be displaced, px
    "motion_blur": (6, 10, 15, 21, 28),  # length of the path, px
    "zoom_blur": (3, 6, 10, 15, 21),  # length of the path at the nearer rims, px
    "snow": (0.03, 0.06, 0.095, 0.135, 0.18),  # share of the image that flakes cover
    "frost": (0.18, 0.3, 0.44, 0.58, 0.73),  # mean optical depth of the ice
    "fog": (0.25, 0.5, 0.8, 1.2, 1.7),  # mean optical depth
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value of HSV, of 1
    "contrast": (0.7, 0.5, 0.35, 0.22, 0.13),  # what is left of it
    "elastic_transform": (0.8, 1.5, 2.4, 3.5, 4.8),  # standard deviation of displacements, px
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


def _impulse_noise(pixels: np.ndarray, share: float, generator: Generator) -> np.ndarray:
    # The deviation grows with the root of the share; of a large image, too, a part must be left.
    strongest = _STRENGTHS["impulse_noise"][-1]
    share *= min(_scale(pixels) ** 2, _MOST_IMPULSES / strongest)
    draws = generator.random(pixels.shape, dtype=np.float32)
    whitened = np.where(draws < share / 2, np.float32(1), pixels)
    return np.where(draws > 1 - share / 2, np.float32(0), whitened)


def _defocus_blur(pixels: np.ndarray, radius: float, generator: Generator) -> np.ndarray:
    return _filtered(pixels, _disc(radius * _scale(pixels)))


def _disc(radius: float) -> np.ndarray:
    across = np.arange(-int(radius + 1), int(radius + 1) + 1)
    distance = np.hypot(across[:, None], across)
    return (radius + 0.5 - distance).clip(0, 1)  # soft-rimmed, so that parts of a pixel count


def _glass_blur(pixels: np.ndarray, reach: float, generator: Generator) -> np.ndarray:
    """Show at each pixel a point near it, as rough glass does, a little blurred against grain."""
    reach *= _scale(pixels)
    draws = generator.random((2, *pixels.shape[:2]), dtype=np.float32)
    rows, columns = reach * (2 * draws - 1)
    return _filtered(_displaced(pixels, rows, columns), _disc(0.5 + reach / 8))


def _displaced(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Show at each pixel the point so many rows and columns away; both broadcast to (H, W)."""
    height, width = pixels.shape[:2]
    top, down = _reflected(np.arange(height)[:, None] + rows, height)
    left, right = _reflected(np.arange(width) + columns, width)
    # A point lies between four pixels and gets of each in proportion to how near it is.
    flat = pixels.reshape(height * width, -1)
    upper, lower = top * width, np.minimum(top + 1, height - 1) * width
    beside = np.minimum(left + 1, width - 1)
    above = flat.take(upper + left, 0) * (1 - right) + flat.take(upper + beside, 0) * right
    below = flat.take(lower + left, 0) * (1 - right) + flat.take(lower + beside, 0) * right
    return above * (1 - down) + below * down


def _reflected(places: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Reflect places at the rim; return the whole pixels and, (H, W, 1), how far past them."""
    places = side - 1 - np.abs(side - 1 - np.abs(places))
    whole = places.astype(int)
    return whole, (places - whole)[..., None].astype(np.float32)


def _motion_blur(pixels: np.ndarray, length: float, generator: Generator) -> np.ndarray:
    angle = np.pi * generator.random()
    return _filtered(pixels, _path(length * _scale(pixels), angle))


def _path(length: float, angle: float) -> np.ndarray:
    reach = int(length / 2 + 1)
    along = np.linspace(-length / 2, length / 2, 16 * reach)
    across = np.arange(-reach, reach + 1)[:, None]
    # Each point of the path falls on the four pixels around it, in proportion to how near they are.
    rows = (1 - np.abs(along * np.sin(angle) - across)).clip(0)
    columns = (1 - np.abs(along * np.cos(angle) - across)).clip(0)
    return rows @ columns.T


def _zoom_blur(pixels: np.ndarray, length: float, generator: Generator) -> np.ndarray:
    """Average exposures of a growing zoom: each doubling adds to those there are their zoom."""
    factor = 1 + length * _scale(pixels) / (min(pixels.shape[:2]) / 2)
    down, right = (np.arange(side) - (side - 1) / 2 for side in pixels.shape[:2])
    for doubling in range(1, _ZOOM_DOUBLINGS + 1):
        inwards = factor ** -(0.5**doubling) - 1
        pixels = (pixels + _displaced(pixels, inwards * down[:, None], inwards * right)) / 2
    return pixels


def _filtered(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve with a kernel of odd sides, through Fourier space, reflecting at the rim."""
    reach = kernel.shape[0] // 2
    padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    sides = padded.shape[:2]
    transfer = np.fft.rfft2(kernel / kernel.sum(), sides)[..., None]
    whole = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * transfer, sides, axes=(0, 1))
    return whole[2 * reach :, 2 * reach :]


def _snow(pixels: np.ndarray, share: float, generator: Generator) -> np.ndarray:
    """Let flakes fall in one wind at three distances, before a veil of those too far to be seen."""
    angle = np.pi * (0.25 + 0.5 * generator.random())
    depth = np.zeros((*pixels.shape[:2], 1))
    # Each distance draws its own flakes, so that more of them are the same ones and others.
    for deviations, layer in zip(_FLAKES, generator.spawn(len(_FLAKES)), strict=True):
        across, along = (deviation * _scale(pixels) for deviation in deviations)
        area = 2 * np.pi * across * along
        count = round(share / len(_FLAKES) * depth.size / area)
        flakes = _scattered(pixels.shape[:2], count, layer)[..., None]
        depth += 2 * area * _filtered(flakes, _bell(across, along, angle))
    left = np.exp(-depth)
    veil = 0.5 * share
    return (pixels * (1 - veil) + 0.85 * veil) * left + (1 - left)


def _scattered(shape: Sequence[int], count: int, generator: Generator) -> np.ndarray:
    """Return how many of `count` points fall on each pixel; one between pixels counts in parts."""
    places = generator.random((count, 2)) * (np.array(shape) - 1)
    whole = places.astype(int)
    field = np.zeros(shape)
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        near = 1 - np.abs(places - whole - corner)
        np.add.at(field, tuple((whole + corner).T), near.prod(axis=1))
    return field


def _bell(across: float, along: float, angle: float) -> np.ndarray:
    """Return a Gaussian with these deviations, `along` at the angle."""
    reach = int(3 * max(across, along)) + 1
    row, column = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    far = (column * np.cos(angle) + row * np.sin(angle)) / along
    aside = (row * np.cos(angle) - column * np.sin(angle)) / across
    return np.exp(-(far**2 + aside**2) / 2)


def _frost(pixels: np.ndarray, depth: float, generator: Generator) -> np.ndarray:
    """Look through a pane on which ferns of ice have grown, the thicker the nearer to its rim."""
    shape = pixels.shape[:2]
    ice = np.array([0.76, 0.84, 0.94])  # bluish white, in the shade
    rows, columns = (np.linspace(-1, 1, side) for side in shape)
    rim = rows[:, None] ** 2 + columns**2
    film = _clouds(shape, generator)
    grain = max(_FERN_GRAIN * _scale(pixels), 1.2)  # branches within a pixel would be noise
    ferns = _ferns(shape, grain, generator)
    left = np.exp(-depth * (0.4 + 0.9 * rim) * (0.6 * film + 0.7 * ferns))[..., None]
    dimmed = pixels * np.exp(-0.15 * depth)  # the clear ice between takes light, too
    return dimmed * left + ice * (1 - left)


def _ferns(shape: Sequence[int], grain: float, generator: Generator) -> np.ndarray:
    """Return ferns, (H, W), the mean 1; a pixel is of the one whose stem it is nearest to."""
    height, width = shape
    row, column, turn, first = generator.random((4, _FERNS), dtype=np.float32)
    branches = generator.random(256) ** 2  # how thick each is: the most of them thin
    heading = np.arctan2(0.5 - row, 0.5 - column) + 3 * (turn - 0.5)  # inwards, more or less
    cosine, sine = np.cos(heading), np.sin(heading)
    down = np.arange(height, dtype=np.float32)[:, None] - row * height  # (H, ferns)
    right = np.arange(width, dtype=np.float32)[:, None] - column * width  # (W, ferns)
    far = (down[:, None] * (sine / 3) + right * (cosine / 3)) ** 2  # a fern is long: 3 to 1
    far += (down[:, None] * cosine - right * sine) ** 2
    fern = far.argmin(axis=2)
    down, right = np.take_along_axis(down, fern, 1), np.take_along_axis(right, fern.T, 1).T
    along = down * sine[fern] + right * cosine[fern]
    aside = np.abs(down * cosine[fern] - right * sine[fern])
    # Branches leave the stem at 60 degrees, as ice does.
    branch = 256 * first[fern] + (along - aside / np.sqrt(3)) / grain
    thickness = np.interp(branch, np.arange(256), branches, period=256)
    thinning = np.exp(-12 * aside / min(shape))
    field = np.maximum(thickness * thinning, 0.7 * np.exp(-aside / grain))
    return field / field.mean()


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


def _elastic_transform(pixels: np.ndarray, deviation: float, generator: Generator) -> np.ndarray:
    """Displace each pixel by noise that is smooth, so that neighbours stay together."""
    grain = _ELASTIC_GRAIN * _scale(pixels)
    noise = generator.standard_normal((*pixels.shape[:2], 2), dtype=np.float32)
    field = _filtered(noise, _bell(grain, grain, 0))
    field *= deviation * _scale(pixels) / field.std()
    return _displaced(pixels, field[..., 0], field[..., 1])


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
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
