"""The pictures that the bundled editor is trained and judged on.

What belongs here: pictures the project makes itself (dead leaves, escape-time fractals, colour
gradients), scikit-learn's digits, and image folders that the user names. What does not: edits.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from diffusemix_pipeline.datasets.images import MAX_PIXELS, UnreadableImageError, read_rgb
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.training.classifier import to_tensor

Images = NDArray[np.uint8]
_SIZES = (32, 64)


def read_image_folder(folder: Path, size: int) -> tuple[Images, list[str]]:
    """All images under `folder/<class>/`, cut to their centre square and resized.

    Returns uint8 [N, size, size, 3] and N class names, in the order of sorted class and file names.
    A folder without class folders is read as one class. What is no image is left out by name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name a folder of class folders of images.")
    classes = sorted(child for child in folder.iterdir() if child.is_dir()) or [folder]
    images, names = [], []
    for its_class in classes:
        for path in sorted(p for p in its_class.rglob("*") if p.is_file()):
            try:
                images.append(_read_square(path, size))
                names.append(its_class.name)
            except UnreadableImageError as reason:
                warnings.warn(f"Left out: {path}: {reason}", stacklevel=2)
    if not images:
        raise UserError(f"{folder} holds no images: name a folder of class folders of images.")
    return np.stack(images), names


def _read_square(path: Path, size: int) -> Images:
    picture = read_rgb(path, MAX_PIXELS)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


def read_digits(size: int, split: str) -> tuple[Images, list[str]]:
    """scikit-learn's handwritten digits, white on black: uint8 [N, size, size, 3] and N names.

    `split` is "test" for every fifth of the 1,797 digits, or "train" for the rest. Their greys are
    rounded down, as the shipped weights learnt them; the pipeline's own are not.
    """
    digits = load_digits()
    held_out = np.arange(len(digits.target)) % 5 == 0
    chosen = held_out if split == "test" else ~held_out
    grey = (digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC) for one in grey]
    pixels = np.stack([np.asarray(one.convert("RGB")) for one in images])
    return pixels, [str(digit) for digit in digits.target[chosen]]


def make_pictures(count: int, size: int, rng: np.random.Generator) -> Images:
    """Pictures that no one owns: a third each of dead leaves, fractals and gradients.

    Returns uint8 [count, size, size, 3].
    """
    makers: Sequence[Callable[[int, np.random.Generator], Images]] = (
        _dead_leaves,
        _fractal,
        _gradient,
    )
    return np.stack([makers[number % 3](size, rng) for number in range(count)])


def _dead_leaves(size: int, rng: np.random.Generator) -> Images:
    """Opaque discs of power-law radius that cover one another, as objects in photographs do."""
    y, x = np.mgrid[0:size, 0:size] / size
    picture = np.ones((size, size, 3)) * rng.random(3)
    for _ in range(60):
        radius = 0.04 * rng.random() ** -0.6
        inside = (x - rng.random()) ** 2 + (y - rng.random()) ** 2 < radius**2
        shade = 1 + 0.5 * rng.normal() * (x - 0.5)[inside, None]
        picture[inside] = rng.random(3) * shade
    return _as_uint8(picture)


def _fractal(size: int, rng: np.random.Generator) -> Images:
    """A Julia set near the border of the Mandelbrot set, in a random cosine palette."""
    angle = rng.uniform(0, 2 * np.pi)
    constant = 1.04 * (np.exp(1j * angle) / 2 - np.exp(2j * angle) / 4)
    zoom = rng.uniform(0.5, 1.5)
    y, x = (np.mgrid[0:size, 0:size] / size - 0.5) * 2 * zoom
    point = x + 1j * y + zoom * rng.normal(0, 0.2)
    escape = np.zeros((size, size))
    for _ in range(40):
        alive = np.abs(point) < 4
        point = np.where(alive, point**2 + constant, point)
        escape += alive
    phase, speed = rng.random(3), rng.uniform(1, 3)
    tone = np.sqrt(escape / 40)[..., None]
    return _as_uint8(0.5 + 0.5 * np.cos(2 * np.pi * (speed * tone + phase)))


def _gradient(size: int, rng: np.random.Generator) -> Images:
    """Smooth colour fields: a sum of a few low-frequency waves a channel."""
    y, x = np.mgrid[0:size, 0:size] / size
    picture = np.ones((size, size, 3)) * rng.random(3)
    for _ in range(4):
        along_y, along_x = rng.normal(0, 1.5, 2)
        wave = np.cos(2 * np.pi * (along_y * y + along_x * x + rng.random()))
        picture += 0.25 * wave[..., None] * rng.normal(0, 1, 3)
    return _as_uint8(picture)


def _as_uint8(picture: NDArray[np.float64]) -> Images:
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)


class SourceBank:
    """All training pictures in memory at 32 and 64 px, from which batches are drawn.

    Digits make up 10 % of the draws and made pictures 15 %; the folders share the rest by the cube
    root of their sizes, so that a small folder is heard next to a large one. Without folders the
    other two share everything.
    """

    def __init__(self, folders: Sequence[Path], *, made_pictures: int, seed: int) -> None:
        self._images: list[dict[int, Images]] = []
        for folder in folders:
            self._images.append({size: read_image_folder(folder, size)[0] for size in _SIZES})
        roots = [len(images[32]) ** (1 / 3) for images in self._images]
        shares = [0.75 * root / sum(roots) for root in roots]
        self._images.append({size: read_digits(size, "train")[0] for size in _SIZES})
        self._images.append(
            {
                size: make_pictures(made_pictures, size, np.random.default_rng(seed))
                for size in _SIZES
            }
        )
        self._shares = torch.tensor([*shares, 0.10, 0.15])

    def digest(self) -> str:
        """Identify the pictures, wherever they were read from."""
        hasher = hashlib.sha256()
        for images in self._images:
            for size in _SIZES:
                hasher.update(images[size].tobytes())
        return hasher.hexdigest()

    def draw(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """Float32 [count, 3, size, size] in [0, 1]; `size` is 32 or 64."""
        sources = self._shares.multinomial(count, replacement=True, generator=generator)
        where = torch.rand(count, generator=generator, dtype=torch.float64)
        picked = [
            images[int(place * len(images))]
            for images, place in (
                (self._images[source][size], place)
                for source, place in zip(sources.tolist(), where.tolist(), strict=True)
            )
        ]
        return to_tensor(np.stack(picked))
