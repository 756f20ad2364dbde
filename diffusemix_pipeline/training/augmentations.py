"""What is drawn anew for every batch: the rivals of DiffuseMix, and DiffuseMix's own mixing online.

What belongs here: changes to training images beyond the basic crop and flip, which every arm has.
What does not: which arm uses which (`arms`), and when they are applied (`loop`).

Rivals are torchvision's where it has them, with its reference recipes' constants, and draw from
torch's global generator, which the loop seeds for each batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import file_sha256
from diffusemix_pipeline.mixing.blending import mix
from diffusemix_pipeline.mixing.masks import Mask
from diffusemix_pipeline.own_code import is_own, own_code
from diffusemix_pipeline.training.data import Images

Option = TypeVar("Option")
Pixels = np.ndarray
"""uint8 (S, S, 3)."""

VERSIONS: dict[str, str] = {"trivialaugment": "2", "randaugment": "2", "pixmix": "3"}
"""Of what an arm draws, where it was changed: a fit with an earlier one is another fit."""

_BILINEAR = v2.InterpolationMode.BILINEAR
_PIXMIX_ROUNDS = 4
_PIXMIX_BETA = 3
_PIXMIX_SEVERITY = 0.3  # of the strongest


@dataclass(frozen=True)
class Augmentation:
    """What happens to a batch, in this order; each part may be missing."""

    redraw: Callable[[np.ndarray, Pixels, Generator], Pixels] | None = None
    """Takes the places int (B,) in the training images and those images uint8 (B, S, S, 3), before
    crop and flip; returns the images to use."""
    each: Callable[[Pixels, Generator], Pixels] | None = None
    """Changes one image after crop and flip."""
    batch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """Takes float (B, 3, S, S) images in [0, 1] and int64 (B,) labels; may return labels as
    probabilities (B, K)."""


NONE = Augmentation()


def trivialaugment() -> Augmentation:
    """One random operation of random strength an image (Müller and Hutter, 2021).

    Bilinear, as in torchvision's reference recipe; its authors' code takes the nearest pixel.
    """
    return Augmentation(each=on_picture(v2.TrivialAugmentWide(interpolation=_BILINEAR)))


def randaugment() -> Augmentation:
    """Two random operations of strength 9 of 30 an image (Cubuk et al., 2020)."""
    return Augmentation(each=on_picture(v2.RandAugment(interpolation=_BILINEAR)))


def augmix() -> Augmentation:
    """Mix three chains of operations into an image (Hendrycks et al., 2020).

    The operations are those that are no corruption of ImageNet-C, as in the paper. The
    Jensen-Shannon loss is left out: every arm has the same loss.
    """
    return Augmentation(each=on_picture(v2.AugMix(all_ops=False)))


def mixup(classes: int) -> Augmentation:
    """Blend images and labels in pairs (Zhang et al., 2018), alpha 0.2."""
    return Augmentation(batch=v2.MixUp(alpha=0.2, num_classes=classes))


def cutmix(classes: int) -> Augmentation:
    """Paste a box of another image, and its share of the label (Yun et al., 2019), alpha 1."""
    return Augmentation(batch=v2.CutMix(alpha=1.0, num_classes=classes))


def pixmix(fractals: Sequence[Pixels]) -> Augmentation:
    """Mix fractals and the image itself into an image (Hendrycks et al., PixMix, 2022, figure 3).

    Up to four rounds, beta 3, as the paper has them for small images; one fractal an image.
    """

    def mixed(image: Pixels, rng: Generator) -> Pixels:
        fractal = _drawn(fractals, rng).astype(np.float32) / 255

        def changed() -> np.ndarray:
            picture = _drawn(_PIXMIX_OPERATIONS, rng)(
                Image.fromarray(image), _PIXMIX_SEVERITY * rng.uniform(0.1, 1)
            )
            return np.asarray(picture, np.float32) / 255

        result = changed() if rng.random() < 0.5 else image.astype(np.float32) / 255
        for _ in range(rng.integers(_PIXMIX_ROUNDS + 1)):
            other = changed() if rng.random() < 0.5 else fractal
            combined = _added if rng.random() < 0.5 else _multiplied
            result = combined(result, other, rng).clip(0, 1)
        return (result * 255).round().astype(np.uint8)

    return Augmentation(each=mixed)


def diffusemix_redrawn(
    images: Images,
    sources: np.ndarray,
    masks: Sequence[Mask],
    fractals: Sequence[Pixels],
    lam: float,
) -> Augmentation:
    """Mix each edit with its original anew: other mask and fractal every time it is seen.

    `images` holds originals first and edits last; `sources` int (edits,) is each edit's original.
    """
    first_edit = len(images) - len(sources)

    def redraw(places: np.ndarray, batch: Pixels, rng: Generator) -> Pixels:
        redrawn = batch.copy()
        edits = np.flatnonzero(places >= first_edit)
        originals = images[sources[places[edits] - first_edit]]
        for row, original in zip(edits, originals, strict=True):
            mask = _drawn(masks, rng)
            fractal = _drawn(fractals, rng)
            redrawn[row] = mix(original, batch[row], mask, fractal, lam)
        return redrawn

    return Augmentation(redraw=redraw)


def own_augmentation(arm: str, classes: int) -> Augmentation:
    """Return what a Python file of the user's own draws: its `augmentation(classes)`."""
    augmentation: Augmentation = _own(arm)(classes)
    return augmentation


def own_version(arm: str) -> str:
    """Identify what a user's own file draws, by its bytes; UserError where there is none."""
    _own(arm)
    return file_sha256(Path(arm).expanduser())


def check_own_arms(arms: Sequence[str]) -> None:
    """Raise UserError for files of a user's own that make no augmentation."""
    for arm in filter(is_own, arms):
        try:
            made = own_augmentation(arm, classes=2)
        except (TypeError, ValueError, LookupError) as error:
            raise UserError(f"training.arms: {arm} fails ({error}). Mend it.") from error
        if not isinstance(made, Augmentation):
            raise UserError(
                f"training.arms: augmentation(classes) of {arm} returns {type(made).__name__}, "
                "which is no Augmentation. See docs/extending.md."
            )


def _own(arm: str) -> Callable[[int], Augmentation]:
    found: Callable[[int], Augmentation] = own_code("training.arms", arm, "augmentation")
    return found


def _drawn(options: Sequence[Option], rng: Generator) -> Option:
    return options[int(rng.integers(len(options)))]


def on_picture(transform: v2.Transform) -> Callable[[Pixels, Generator], Pixels]:
    """Apply a torchvision transform, which draws from torch's global generator."""
    return lambda image, rng: np.asarray(transform(Image.fromarray(image)))


# PixMix's operations on a picture, strength 0 to 1; a side is drawn from torch's generator


def _either_way(amount: float) -> float:
    return amount if torch.rand(()) < 0.5 else -amount


def _sheared(degrees_x: float, degrees_y: float) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, strength: functional.affine(
        picture, 0, [0, 0], 1,
        [_either_way(strength * degrees_x), _either_way(strength * degrees_y)], _BILINEAR,
    )  # fmt: skip


def _shifted(across: float, down: float) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, strength: functional.affine(
        picture, 0,
        [round(_either_way(strength * share * picture.width)) for share in (across, down)],
        1, [0, 0],
    )  # fmt: skip


_PIXMIX_OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda picture, strength: functional.autocontrast(picture),
    lambda picture, strength: functional.equalize(picture),
    lambda picture, strength: functional.posterize(picture, 4 - int(4 * strength)),
    lambda picture, strength: functional.solarize(picture, 255 * (1 - strength)),
    lambda picture, strength: functional.rotate(picture, _either_way(30 * strength), _BILINEAR),
    _sheared(17, 0),
    _sheared(0, 17),
    _shifted(1 / 3, 0),
    _shifted(0, 1 / 3),
)


def _weights(rng: Generator) -> tuple[float, float]:
    """Return how much of two images is kept: the second's weight may be negative."""
    if rng.random() < 0.5:
        return rng.beta(_PIXMIX_BETA, 1), rng.beta(1, _PIXMIX_BETA)
    return 1 + rng.beta(1, _PIXMIX_BETA), -rng.beta(1, _PIXMIX_BETA)


def _added(one: np.ndarray, other: np.ndarray, rng: Generator) -> np.ndarray:
    a, b = _weights(rng)
    return (a * (2 * one - 1) + b * (2 * other - 1) + 1) / 2


def _multiplied(one: np.ndarray, other: np.ndarray, rng: Generator) -> np.ndarray:
    a, b = _weights(rng)
    return (2 * one) ** a * (2 * other.clip(1e-37)) ** b / 2
