"""Nine procedural edits, one a prompt: what the bundled editor learns to imitate.

What belongs here: image batch + seed -> edited batch. What does not: reading images, models.

Each edit is a distribution: its strength, palette, light direction, bands or tiles are drawn for
every image. Most of the variety sits in a few global parameters, because a small model can learn
to draw those, while fine random detail (snowflakes) is kept sparse. Lengths are fractions of the
image's side, so an edit looks alike at every size. Every edit keeps the order of light and dark,
and so the subject.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def apply_teacher(images: Tensor, prompt: str, generator: torch.Generator) -> Tensor:
    """Edit every image of a batch by one prompt's teacher, each with its own random parameters.

    images: float32 [N, 3, H, W] in [0, 1]. Returns the same shape, dtype and range. The draws
    come from `generator` alone: the same generator state gives the same edits.
    """
    return _TEACHERS[prompt](images, _Draw(len(images), generator)).clamp(0, 1)


def apply_teachers(images: Tensor, prompts: Sequence[str], generator: torch.Generator) -> Tensor:
    """Edit image i by `prompts[i]`; otherwise as `apply_teacher`."""
    edited = torch.empty_like(images)
    for prompt in PROMPTS:
        rows = [row for row, its_prompt in enumerate(prompts) if its_prompt == prompt]
        if rows:
            edited[rows] = apply_teacher(images[rows], prompt, generator)
    return edited


class _Draw:
    """Random parameters, one an image, shaped [N, 1, 1, 1] to broadcast over an image batch."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator

    def uniform(self, low: float, high: float, number: int = 1) -> Tensor:
        values = torch.rand(self.count, number, 1, 1, generator=self.generator)
        return low + (high - low) * values

    def choice(self, *options: float) -> Tensor:
        picked = torch.randint(len(options), (self.count,), generator=self.generator)
        return torch.tensor(options)[picked].view(-1, 1, 1, 1)


def _autumn(image: Tensor, draw: _Draw) -> Tensor:
    """Gold to russet leaves in low sun from the left or the right."""
    russet, strength, side = draw.uniform(0, 1), draw.uniform(0.55, 0.85), draw.choice(-1, 1)
    dark = _mix(_colour(0.24, 0.13, 0.0), _colour(0.24, 0.03, 0.02), russet)
    light = _mix(_colour(1.0, 0.88, 0.30), _colour(1.0, 0.55, 0.22), russet)
    toned = _mix(dark, light, _luma(image))
    _, x = _coordinates(image)
    sun = 0.16 * side * (x - 0.5) * 2 * _colour(1.0, 0.7, 0.2)
    return _mix(image, toned, strength) + sun


def _snowy(image: Tensor, draw: _Draw) -> Tensor:
    """Pale cold light, snow lying at the bottom, a few flakes in the air."""
    cover, depth, cold = draw.uniform(0.3, 0.65), draw.uniform(0.1, 0.28), draw.uniform(0, 1)
    frost = _mix(_colour(0.95, 0.96, 0.98), _colour(0.72, 0.86, 1.0), cold)
    pale = _mix(_luma(image), image, 0.65) * (1 - 0.5 * cover) + 0.5 * cover * frost
    y, x = _coordinates(image)
    edge = 1 - depth + 0.04 * torch.sin(2 * math.pi * (1.5 * x + 0.2))
    lying = torch.sigmoid((y - edge) / 0.03)
    pale = _mix(pale, _colour(0.97, 0.98, 1.0), 0.75 * lying)
    flakes = 6
    centre_y, centre_x = draw.uniform(0, 1, flakes), draw.uniform(0, 1, flakes)
    near = torch.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / (2 * 0.022**2))
    return _mix(pale, _colour(1.0, 1.0, 1.0), 0.6 * near.amax(1, keepdim=True))


def _watercolor(image: Tensor, draw: _Draw) -> Tensor:
    """Soft pigment on white paper whose border stays bare, under a tinted wash."""
    density, tint, tilt = draw.uniform(0.65, 0.95), draw.uniform(0, 1), draw.choice(-1, 1)
    soft = _saturate(_mix(image, _blur(image, 0.03), 0.4), 1.2)
    y, x = _coordinates(image)
    pools = 0.5 + 0.5 * torch.sin(2 * math.pi * (0.9 * y + 0.7 * tilt * x + 0.1))
    wash = _hue(0.45 + 0.5 * tint) * 0.4 + 0.6
    pigment = (1 - density * (1 - soft)) * _mix(wash, _colour(1.0, 1.0, 1.0), 0.7 * pools)
    wobble = 0.012 * torch.sin(2 * math.pi * 2.5 * (x + y)) + 0.008 * torch.cos(17 * (x - y))
    inside = torch.minimum(torch.minimum(x, 1 - x), torch.minimum(y, 1 - y)) + wobble
    painted = torch.sigmoid((inside - 0.05) / 0.015)
    rim = 0.1 * torch.exp(-(((inside - 0.085) / 0.025) ** 2))
    return _mix(_colour(0.99, 0.98, 0.95), pigment - rim, painted)


def _sunset(image: Tensor, draw: _Draw) -> Tensor:
    """A violet sky that turns orange towards a low sun on the left, in the middle or right."""
    strength, horizon, sun_x = (
        draw.uniform(0.5, 0.8),
        draw.uniform(0.5, 0.8),
        draw.choice(0.15, 0.5, 0.85),
    )
    y, x = _coordinates(image)
    down = (y / horizon).clamp(0, 1)
    sky = _mix(_colour(0.30, 0.14, 0.50), _colour(0.98, 0.42, 0.22), down)
    ground = ((y - horizon) / (1 - horizon)).clamp(0, 1)
    sky = _mix(sky, _colour(0.45, 0.12, 0.25), ground)
    lit = _mix(image * (0.45 + 0.55 * sky), sky, 0.4)
    glow = torch.exp(-(((x - sun_x) / 0.24) ** 2) - ((y - horizon) / 0.16) ** 2)
    return _mix(image, lit, strength) + 0.5 * glow * _colour(1.0, 0.7, 0.25)


def _rainbow(image: Tensor, draw: _Draw) -> Tensor:
    """One wide arc of all the colours, its radius, strength and foot drawn."""
    strength, radius, foot = draw.uniform(0.4, 0.6), draw.uniform(0.45, 0.62), draw.choice(0.1, 0.9)
    y, x = _coordinates(image)
    outwards = (torch.sqrt((x - foot) ** 2 + (y - 1.05) ** 2) - radius) / 0.42
    arc = torch.sigmoid((0.5 - (outwards - 0.5).abs()) / 0.04)
    band = _hue(0.8 * (1 - outwards).clamp(0, 1))
    bright = _mix(image, _colour(0.75, 0.85, 1.0), 0.15)
    return _mix(bright, 0.55 * image + 0.6 * band, strength * 1.2 * arc)


def _aurora(image: Tensor, draw: _Draw) -> Tensor:
    """A dark blue night crossed by two waving curtains of green to violet light."""
    night, place, violet = draw.uniform(0.6, 0.8), draw.uniform(0, 0.35), draw.uniform(0, 1)
    y, x = _coordinates(image)
    dark = image * night * _colour(0.75, 0.9, 1.1) + _colour(0.0, 0.03, 0.12)
    path = x - 0.10 * torch.sin(2 * math.pi * (1.1 * y + place)) - place
    off = torch.remainder(path, 0.5) - 0.25
    curtain = torch.exp(-((off / 0.11) ** 2)) * (1 - 0.7 * y)
    low = _mix(_colour(0.1, 0.95, 0.45), _colour(0.1, 0.75, 0.85), violet)
    high = _mix(_colour(0.2, 0.7, 0.6), _colour(0.75, 0.2, 0.9), violet)
    return dark + 0.5 * curtain * _mix(high, low, y)


def _mosaic(image: Tensor, draw: _Draw) -> Tensor:
    """Eight by eight tiles, alternately bright and dull, in dark or pale grout."""
    grout, hold, warm = draw.choice(0, 1), draw.uniform(0.22, 0.42), draw.uniform(-1, 1)
    tiles = 8
    flat = functional.interpolate(
        functional.adaptive_avg_pool2d(image, tiles), size=image.shape[-2:], mode="nearest-exact"
    )
    y, x = (tiles * axis for axis in _coordinates(image))
    glazed = _saturate(_mix(image, flat, 0.4), 1.25)
    chequer = 1 - 2 * torch.remainder(y.floor() + x.floor(), 2)
    glazed = glazed + 0.035 * chequer + 0.05 * warm * _colour(1.0, 0.2, -1.0)
    joint = torch.maximum((y % 1 < 0.25).float(), (x % 1 < 0.25).float())
    mortar = _mix(_colour(0.10, 0.08, 0.10), _colour(0.93, 0.88, 0.78), grout)
    return _mix(glazed, mortar, hold * joint)


def _ukiyo_e(image: Tensor, draw: _Draw) -> Tensor:
    """Flat planes from indigo to cream, ink outlines, a graded band of blue or red above."""
    ink, reach, red = draw.uniform(0.3, 0.6), draw.uniform(0.35, 0.75), draw.choice(0, 1)
    luma = _blur(_luma(image), 0.02)
    planes = 4
    step = luma * planes
    part = torch.sigmoid((step - step.floor() - 0.5) * 6)
    flat = (step.floor() + part) / planes
    printed = _mix(
        _mix(_colour(0.10, 0.15, 0.33), _colour(0.66, 0.56, 0.44), (2 * flat).clamp(0, 1)),
        _colour(0.98, 0.92, 0.76),
        (2 * flat - 1).clamp(0, 1),
    )
    printed = printed + 0.5 * (image - _luma(image))
    printed = _mix(printed, _colour(0.08, 0.08, 0.15), ink * _outline(luma))
    y, _ = _coordinates(image)
    grade = (1 - y / reach).clamp(0, 1)
    band = _mix(_colour(0.05, 0.22, 0.52), _colour(0.82, 0.26, 0.18), red)
    return _mix(printed, band, 0.6 * grade)


def _crayon(image: Tensor, draw: _Draw) -> Tensor:
    """Pale colours rubbed on paper in slanting strokes, contours in a coloured crayon."""
    cover, hue, slant = draw.uniform(0.55, 0.8), draw.uniform(0, 1), draw.choice(-1, 1)
    crayon = _mix(_colour(0.15, 0.2, 0.65), _colour(0.65, 0.15, 0.15), hue)
    paper = _mix(_colour(0.98, 0.97, 0.93), crayon, 0.12)
    y, x = _coordinates(image)
    stroke = 0.5 + 0.5 * torch.sin(2 * math.pi * 6 * (y + slant * x))
    dark = 1 - _luma(image)
    rubbed = paper - cover * (1 - _saturate(image, 1.2)) * (0.85 + 0.2 * stroke)
    rubbed = _mix(rubbed, crayon, 0.22 * dark * stroke)
    return _mix(rubbed, crayon, 0.65 * _outline(_blur(_luma(image), 0.015)))


_TEACHERS: dict[str, Callable[[Tensor, _Draw], Tensor]] = {
    "autumn": _autumn,
    "snowy": _snowy,
    "watercolor art": _watercolor,
    "sunset": _sunset,
    "rainbow": _rainbow,
    "aurora": _aurora,
    "mosaic": _mosaic,
    "ukiyo-e": _ukiyo_e,
    "a sketch with crayon": _crayon,
}
PROMPTS = tuple(_TEACHERS)


def _colour(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1)


def _mix(first: Tensor, second: Tensor, share: Tensor | float) -> Tensor:
    """`first` where `share` is 0, `second` where it is 1."""
    return first + (second - first) * share


def _coordinates(image: Tensor) -> tuple[Tensor, Tensor]:
    """y [1, 1, H, 1] and x [1, 1, 1, W] of the pixel centres, in (0, 1)."""
    height, width = image.shape[-2:]
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    return y.view(1, 1, -1, 1), x.view(1, 1, 1, -1)


def _luma(image: Tensor) -> Tensor:
    """Rec. 601 luminance [N, 1, H, W]."""
    return (image * _colour(0.299, 0.587, 0.114)).sum(1, keepdim=True)


def _saturate(image: Tensor, factor: float) -> Tensor:
    return _mix(_luma(image), image, factor)


def _hue(turn: Tensor) -> Tensor:
    """The fully saturated colour at `turn` [N, 1, ...] of the colour circle (0 and 1: red)."""
    offsets = torch.tensor([0.0, 2 / 3, 1 / 3]).view(1, 3, 1, 1)
    return (torch.remainder(turn + offsets, 1) * 6 - 3).abs().sub(1).clamp(0, 1)


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, `sigma` as a fraction of the shorter side."""
    pixels = sigma * min(image.shape[-2:])
    reach = max(1, math.ceil(2 * pixels))
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * pixels**2))
    kernel = kernel / kernel.sum()
    channels = image.shape[1]
    padded = functional.pad(image, (reach, reach, reach, reach), mode="reflect")
    rows = functional.conv2d(
        padded, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels
    )
    return functional.conv2d(
        rows, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels
    )


def _outline(luma: Tensor) -> Tensor:
    """How much of an edge lies at each pixel, 0 to 1; the slope is counted per side length."""
    side = min(luma.shape[-2:])
    padded = functional.pad(luma, (1, 1, 1, 1), mode="replicate")
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    right = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    slope = torch.sqrt(down**2 + right**2) * side / 64
    return ((slope - 0.06) / 0.25).clamp(0, 1)
