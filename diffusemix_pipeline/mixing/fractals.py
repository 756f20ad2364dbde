"""Fractals: made from a seed, or read from a folder.

What belongs here: the pictures F of A = (1 - lam) H + lam F, and their identity. What does not:
drawing which fractal an image gets (`stages`), and blending it (`blending`).

Two kinds are made, half of each. A flame is the attractor of a few random affine maps of the plane,
bent by one non-linear function, found by the chaos game and toned by the logarithm of its density.
An escape-time picture shows how soon z -> fold(z)^n + c leaves a disc, in a window of a Julia set
or of a parameter plane (Mandelbrot set, burning ship, tricorn) where that varies most.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusemix_pipeline.datasets.images import (
    MAX_PIXELS,
    UnreadableImageError,
    png_bytes,
    read_rgb,
    to_square,
)
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import write_bytes
from diffusemix_pipeline.identity import digest, file_sha256, seed_from
from diffusemix_pipeline.progress import Progress
from diffusemix_pipeline.settings import Mixing

# Raise it when a change here changes a picture: the cache and the data version follow.
CODE_VERSION = 1
_READ_VERSION = 2  # of the user's own
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_PILOT_SIZE = 32

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Points = NDArray[np.complex64]  # of the plane
Bend = Callable[[Points], Points]
Drawing = Callable[[int], Floats]  # size in px -> rgb (size, size, 3) in [0, 1]


# The set of fractals ----------------------------------------------------------------------------


def load_fractals(
    mixing: Mixing, seed: int, size: int, cache: Path, progress: Progress
) -> dict[str, Pixels]:
    """Return every fractal by its id: uint8 (size, size, 3).

    Without `mixing.fractal_dir`, `fractal_count` of them are made, 'made-00000' and on, each from
    `seed` and its index alone; `cache` keeps them as PNG, and a later call makes only what is
    missing. With a folder, each image below it is read as RGB, its centre square cut out and
    resized; the id is its path in the folder. Images that cannot be read or hold more than
    MAX_PIXELS are left out, with one warning that names them.

    Raises UserError if the folder does not exist or holds no image that can be read.
    """
    if mixing.fractal_dir:
        return _read_folder(Path(mixing.fractal_dir).expanduser(), size, progress)
    folder = cache / digest("fractals", CODE_VERSION, seed, size)
    fractals = {}
    for index in range(mixing.fractal_count):
        name = f"made-{index:05d}"
        fractals[name] = _cached(folder / f"{name}.png", seed_from(seed, "fractal", index), size)
        progress("Making fractals", index + 1, mixing.fractal_count)
    return fractals


def fractals_version(mixing: Mixing, seed: int) -> str:
    """Return a digest that changes when the set of fractals would.

    Raises UserError if the folder does not exist or holds no file named like an image.
    """
    if not mixing.fractal_dir:
        return digest("made", CODE_VERSION, seed, mixing.fractal_count)
    files = _image_files(Path(mixing.fractal_dir).expanduser())
    try:
        contents = [[name, file_sha256(file)] for name, file in files.items()]
    except OSError as error:
        raise UserError(
            f"mixing.fractal_dir: {error.filename} cannot be read: {error.strerror}. Make it "
            "readable (`chmod u+r`), or take it out."
        ) from None
    return digest("read", _READ_VERSION, contents)


def _cached(file: Path, seed: int, size: int) -> Pixels:
    if file.exists():
        with suppress(UnreadableImageError):  # what a disk damaged is made anew
            return to_square(read_rgb(file, MAX_PIXELS), size)
    fractal = make_fractal(seed, size)
    write_bytes(file, png_bytes(fractal))
    return fractal


def _read_folder(folder: Path, size: int, progress: Progress) -> dict[str, Pixels]:
    files = _image_files(folder)
    fractals, left_out = {}, []
    for done, (name, file) in enumerate(files.items(), start=1):
        try:
            fractals[name] = to_square(read_rgb(file, MAX_PIXELS), size)
        except UnreadableImageError as error:
            left_out.append(f"{name} ({error})")
        progress("Reading fractals", done, len(files))
    if not fractals:
        raise _no_images(folder)
    if left_out:
        warnings.warn(f"Left out of the fractals: {', '.join(left_out)}", stacklevel=3)
    return fractals


def _image_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(
            f"mixing.fractal_dir: {folder} is no folder. "
            "Name a folder of images, or leave it empty to have fractals made."
        )
    files = (file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
    named = {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}
    if not named:
        raise _no_images(folder)
    return dict(sorted(named.items()))


def _no_images(folder: Path) -> UserError:
    return UserError(
        f"mixing.fractal_dir: {folder} holds no image that can be read "
        f"({', '.join(_SUFFIXES)}). Put some there, or leave it empty to have fractals made."
    )


# One fractal ------------------------------------------------------------------------------------


def make_fractal(seed: int, size: int) -> Pixels:
    """Return the fractal of `seed` in colour and anti-aliased: uint8 (size, size, 3).

    It depends on the two arguments alone, and what it shows on `seed` alone: designs are drawn from
    it until one is lively, judged and stretched in contrast as it looks at 32 px.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    design = (_flame, _escape_time)[int(rng.integers(2))]
    while True:
        drawing = design(rng)
        pilot = drawing(_PILOT_SIZE)
        low, high = np.quantile(pilot, (0.01, 0.99))
        if high > low and _is_lively(_stretched(pilot, low, high)):
            return (_stretched(drawing(size), low, high) * 255 + 0.5).astype(np.uint8)


def _stretched(picture: Floats, low: float, high: float) -> Floats:
    return np.clip((picture - np.float32(low)) / np.float32(high - low), 0, 1)


def _is_lively(picture: Floats) -> bool:
    """Tell whether a picture of 32 px is worth mixing in, by its grey levels in [0, 1].

    Their standard deviation exceeds 0.16, and the entropy of their 16-bin histogram 2.8 bits, else
    it is flat; neighbours correlate by more than 0.6, else it is noise; and in the median block of
    8 px the root mean square gradient exceeds 0.085, else it is empty, and the coherence of the
    structure tensor (1: all gradients in one direction) stays below 0.85, else it is stripes.
    """
    grey = picture.mean(axis=2, dtype=np.float64)
    if grey.std() <= 0.16:
        return False
    shares = np.histogram(grey, bins=16, range=(0, 1))[0] / grey.size
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()
    likeness = np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1]
    down, along = np.gradient(grey)
    xx, yy, xy = (_block_means(product) for product in (along**2, down**2, along * down))
    coherence = np.hypot(xx - yy, 2 * xy) / np.maximum(xx + yy, 1e-9)
    return bool(
        entropy > 2.8
        and likeness > 0.6
        and np.median(np.sqrt(xx + yy)) > 0.085
        and np.median(coherence) < 0.85
    )


def _block_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.reshape(4, 8, 4, 8).mean(axis=(1, 3))


def _averaged(fine: Floats, factor: int) -> Floats:
    height, width, _ = fine.shape
    cells = fine.reshape(height // factor, factor, width // factor, factor, 3)
    return cells.mean(axis=(1, 3), dtype=np.float32)


def _palette(rng: np.random.Generator, dark: float) -> Floats:
    """Draw a cycle of 4 or 6 colours, darker and brighter in turn: rgb (1024, 3) in [0, 1]."""
    count = 2 * int(rng.integers(2, 4))
    bright = np.arange(count) % 2 == 1
    hue = rng.random() + np.cumsum(rng.uniform(-0.3, 0.3, count))
    value = np.where(bright, rng.uniform(0.8, 1, count), rng.uniform(dark, dark + 0.3, count))
    saturation = np.where(bright, rng.uniform(0.2, 0.9, count), rng.uniform(0.6, 1, count))
    pure = np.clip(np.abs((hue[:, None] + [0, 2 / 3, 1 / 3]) % 1 * 6 - 3) - 1, 0, 1)
    anchors = value[:, None] * (1 - saturation[:, None] * (1 - pure))
    steps = np.linspace(0, count, 1024, endpoint=False)
    channels = [np.interp(steps, np.arange(count), channel, period=count) for channel in anchors.T]
    return np.stack(channels, axis=1).astype(np.float32)


def _coloured(palette: Floats, position: Floats) -> Floats:
    """Return the colours at positions in [0, inf) along the palette, whose length is 1."""
    return palette[(position * len(palette)).astype(np.int32) % len(palette)]


# Flames -----------------------------------------------------------------------------------------

_CELLS_A_SIDE = 2  # of a pixel
_POINTS_A_CELL = 16
_ROUNDS = 40
_BURN_IN = 12

_VARIATIONS: tuple[Bend, ...] = (
    lambda z: z,
    lambda z: z,
    lambda z: np.sin(z.real) + np.complex64(1j) * np.sin(z.imag),
    lambda z: z / (z.real**2 + z.imag**2 + np.float32(1e-2)),
    lambda z: z * np.exp(np.complex64(1j) * (z.real**2 + z.imag**2)),
    np.sqrt,
)


@dataclass(frozen=True)
class _System:
    """Maps z -> variation(turn z + mirror conj(z) + shift): one entry a map in each array."""

    turn: Points
    mirror: Points
    shift: Points
    cumulated: NDArray[np.float64]  # how often a map is taken
    hue: Floats  # what a map pulls a point's colour to
    variation: Bend
    symmetry: Points  # rotations under which the picture is the same
    seed: int


def _flame(rng: np.random.Generator) -> Drawing:
    system = _draw_system(rng)
    palette = _palette(rng, dark=0.5)
    background = palette[0] / 4
    cycles = np.float32(rng.uniform(0.6, 1.4))
    centre, half = _inner_window(system)
    coarse, _ = _density_and_hue(system, centre, half, 32)
    full = max(np.quantile(coarse, 0.93), np.float32(1e-3))

    def drawing(size: int) -> Floats:
        side = size * _CELLS_A_SIDE
        density, hue = _density_and_hue(system, centre, half, side)
        weight = np.minimum(density / full, 1)[:, None]
        colours = background + weight * (_coloured(palette, hue * cycles) - background)
        return _averaged(colours.reshape(side, side, 3), _CELLS_A_SIDE)

    return drawing


def _draw_system(rng: np.random.Generator) -> _System:
    count = int(rng.integers(2, 6))
    length = rng.uniform(0.25, 0.95, (2, count)) * [[1], [rng.uniform(0, 0.5)]]
    length *= np.minimum(1, 0.95 / length.sum(axis=0))  # so that every affine map contracts
    turn, mirror = length * np.exp(2j * np.pi * rng.random((2, count)))
    area = np.abs(length[0] ** 2 - length[1] ** 2) + 0.05
    order = int(rng.choice([1, 1, 1, 2, 3, 4, 5, 6]))
    return _System(
        turn=turn.astype(np.complex64),
        mirror=mirror.astype(np.complex64),
        shift=_draw_points(rng, count, -1, 1),
        cumulated=np.cumsum(area / area.sum()),
        hue=rng.permutation(np.linspace(0, 1, count, dtype=np.float32)),
        variation=_VARIATIONS[int(rng.integers(len(_VARIATIONS)))],
        symmetry=np.exp(2j * np.pi * np.arange(order) / order).astype(np.complex64),
        seed=int(rng.integers(2**63)),
    )


def _draw_points(rng: np.random.Generator, count: int, low: float, high: float) -> Points:
    return (rng.uniform(low, high, (count, 2)) @ [1, 1j]).astype(np.complex64)


def _orbit(system: _System, population: int, rounds: int) -> Iterator[tuple[Points, Floats]]:
    """Play the chaos game: yield the points (population,) and their hues in [0, 1] each round."""
    rng = np.random.Generator(np.random.PCG64(system.seed))
    points = _draw_points(rng, population, -1, 1)
    hue = np.full(population, 0.5, np.float32)
    for step in range(_BURN_IN + rounds):
        taken = np.searchsorted(system.cumulated[:-1], rng.random(population, np.float32))
        moved = system.turn[taken] * points + system.mirror[taken] * points.conj()
        points = system.variation(moved + system.shift[taken])
        hue = (hue + system.hue[taken]) * np.float32(0.5)
        if step >= _BURN_IN:
            yield points * system.symmetry[step % len(system.symmetry)], hue


def _inner_window(system: _System) -> tuple[complex, float]:
    """Return centre and half side of a square that the attractor overflows."""
    points = np.concatenate([points for points, _ in _orbit(system, population=256, rounds=30)])
    x, y = (np.quantile(axis, (0.12, 0.88)) for axis in (points.real, points.imag))
    centre = complex(x.mean(), y.mean()) if len(system.symmetry) == 1 else 0j
    return centre, max(float(min(np.ptp(x), np.ptp(y))) / 2, 1e-3)


def _density_and_hue(
    system: _System, centre: complex, half: float, side: int
) -> tuple[Floats, Floats]:
    """Return log density and mean hue of each of side x side cells, flat."""
    hits, hues = np.zeros((2, side * side), np.float32)
    corner, scale = np.complex64(centre - half * (1 + 1j)), np.float32(side / 2 / half)
    for points, hue in _orbit(system, side * side * _POINTS_A_CELL // _ROUNDS, _ROUNDS):
        points = (points - corner) * scale
        x, y = points.real, points.imag
        inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
        cell = y[inside].astype(np.int32) * side + x[inside].astype(np.int32)
        np.add.at(hits, cell, np.float32(1))
        np.add.at(hues, cell, hue[inside])
    hues /= np.maximum(hits, 1)
    return np.log1p(hits * np.float32(3 / _POINTS_A_CELL)), hues


# Escape time ------------------------------------------------------------------------------------

_SAMPLES_A_SIDE = 4  # of a pixel
_ROWS = 8  # of pixels at once: the working set stays in the processor's cache
_LIMIT = 90
_ESCAPED = 64.0  # square of the disc's radius

_FOLDS: tuple[Bend, ...] = (
    lambda z: z,
    lambda z: z,
    lambda z: z,
    lambda z: np.abs(z.real) + np.complex64(1j) * np.abs(z.imag),
    np.conj,
)


@dataclass(frozen=True)
class _Iteration:
    """z -> fold(z)^power + c, with one c for all (a Julia set) or each starting point its own."""

    fold: Bend
    power: int
    constant: complex | None


def _escape_time(rng: np.random.Generator) -> Drawing:
    iteration = _draw_iteration(rng)
    centre, span = _busy_window(iteration, rng)
    palette, inner_palette = _palette(rng, dark=0.05), _palette(rng, dark=0.05)
    cycles = np.float32(rng.uniform(0.8, 2))
    by_nearness = rng.random() < 0.3
    # Both fields are spread evenly over [0, 1], by their quantiles in a coarse look at the window.
    time, near = _iterated(iteration, _grid(centre, span, 64, 0, 64))
    marks = np.linspace(0, 1, 65)
    times = np.quantile(time[time < _LIMIT], marks) if (time < _LIMIT).any() else marks
    nears = np.quantile(near, marks)

    def coloured(points: Points) -> Floats:
        time, near = _iterated(iteration, points)
        early = np.interp(time, times, marks).astype(np.float32)
        close = np.interp(near, nears, marks).astype(np.float32)
        hue, light = (close, early) if by_nearness else (early, close)
        outer = _coloured(palette, hue * cycles) * (light[..., None] + 1) / 2
        return np.where((time < _LIMIT)[..., None], outer, _coloured(inner_palette, close))

    def drawing(size: int) -> Floats:
        side, rows = size * _SAMPLES_A_SIDE, _ROWS * _SAMPLES_A_SIDE
        bands = (_grid(centre, span, side, top, top + rows) for top in range(0, side, rows))
        return np.concatenate([_averaged(coloured(band), _SAMPLES_A_SIDE) for band in bands])

    return drawing


def _draw_iteration(rng: np.random.Generator) -> _Iteration:
    fold = _FOLDS[int(rng.integers(len(_FOLDS)))]
    plane = _Iteration(fold, int(rng.choice([2, 2, 2, 3, 4])), constant=None)
    if rng.random() < 0.4:
        return plane
    # Just outside the plane's set lie the constants with the richest Julia sets.
    candidates = _draw_points(rng, 256, -1.5, 1.5)
    time, _ = _iterated(plane, candidates)
    return _Iteration(fold, plane.power, complex(candidates[np.argmin(np.abs(time - 25))]))


def _busy_window(iteration: _Iteration, rng: np.random.Generator) -> tuple[complex, complex]:
    """Return centre and half side (turned by a random angle) of a window, found by zooming in.

    Each zoom is centred on a point drawn by how steeply the logarithm of its escape time changes.
    """
    centre, span = 0j, complex(1.4 * np.exp(2j * np.pi * rng.random()))
    zooms = rng.integers(3, 5) if iteration.constant is None else rng.integers(2, 4)
    for _ in range(int(zooms)):
        points = _grid(centre, span, 32, 0, 32)
        time, _ = _iterated(iteration, points)
        slopes = np.gradient(np.log(np.maximum(time, 1)).astype(np.float64))
        busy = (slopes[0] ** 2 + slopes[1] ** 2 + 1e-9).ravel()
        centre = complex(points.ravel()[rng.choice(busy.size, p=busy / busy.sum())])
        span *= rng.uniform(0.35, 0.65)
    return centre, span


def _grid(centre: complex, span: complex, side: int, top: int, bottom: int) -> Points:
    """Return rows `top` to `bottom` of the middles of side x side cells of a window."""
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    return (centre + span * (axis + 1j * axis[top:bottom, None])).astype(np.complex64)


def _iterated(iteration: _Iteration, start: Points) -> tuple[Floats, Floats]:
    """Return each point's smooth escape time, _LIMIT if it stays, and how near to 0 it came."""
    z = start.ravel()
    c = z if iteration.constant is None else np.full_like(z, iteration.constant)
    time, near = np.full(z.size, _LIMIT, np.float32), np.empty(z.size, np.float32)
    index, nearest = np.arange(z.size), np.full(z.size, np.inf, np.float32)
    for step in range(1, _LIMIT):
        base = iteration.fold(z)
        z = base
        for _ in range(iteration.power - 1):
            z = z * base
        z = z + c
        square = z.real**2 + z.imag**2
        nearest = np.minimum(nearest, square)
        left = square > _ESCAPED
        if left.any():
            beyond = np.log(np.log(square[left]) / np.log(_ESCAPED)) / np.log(iteration.power)
            time[index[left]], near[index[left]] = step - beyond, nearest[left]
            z, c, index, nearest = z[~left], c[~left], index[~left], nearest[~left]
    near[index] = nearest
    return time.reshape(start.shape), np.sqrt(near).reshape(start.shape)
