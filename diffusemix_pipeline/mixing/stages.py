"""The third and fourth stage: an edit becomes a hybrid to look at, and an augmented image.

Masks and fractals are drawn here, after the edits: redrawing them costs no UNet evaluation. Both
stages start from the decoded source and the decoded edit, not from each other's files, so that
encodings do not pile up.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusemix_pipeline.datasets.images import png_bytes
from diffusemix_pipeline.datasets.manifest import (
    Stage,
    class_names,
    finished_stage,
    layout_of,
    read_stage,
)
from diffusemix_pipeline.datasets.parts import Part, StoredRow, write_stage
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import digest, draw
from diffusemix_pipeline.mixing.blending import hybrid, mix
from diffusemix_pipeline.mixing.fractals import fractals_version, load_fractals
from diffusemix_pipeline.mixing.masks import Mask, half_mask
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings

CODE_VERSION = "3"
_AT_ONCE = 256  # images that wait, made, to be written

Join = Callable[[np.ndarray, np.ndarray, Mask, str], tuple[np.ndarray, dict[str, Any]]]
"""Joins an original, an edit and the mask by the edit's key; says what else it drew. Can be
pickled."""


def make_hybrids(
    raw: Stage,
    generated: Stage,
    settings: Settings,
    out: Path,
    *,
    aside: Path,
    progress: Progress = silent,
) -> Stage:
    """Write H = M I + (1 - M) G for every edit (paper, the hybrid image)."""
    masks = settings.mixing.model_dump(include={"masks", "seam"})
    drawn = [settings.seed, masks]
    fingerprint = digest("hybrid", CODE_VERSION, raw.version, generated.version, *drawn)
    finished = finished_stage(out, fingerprint, layout_of(raw, settings.storage))
    if finished:
        return finished
    mixer = Mixer(raw.folder, generated.folder, settings, _half_and_half)
    return write_mixed("hybrid", fingerprint, drawn, mixer, raw, generated, out, aside, progress)


def make_augmented(
    raw: Stage,
    generated: Stage,
    settings: Settings,
    out: Path,
    *,
    fractal_cache: Path,
    aside: Path,
    progress: Progress = silent,
) -> Stage:
    """Write A = (1 - lam) H + lam F for every edit, in one pass (paper, the final image)."""
    mixing, seed = settings.mixing, settings.seed
    of_mixing = mixing.model_dump(include={"masks", "seam", "lam"})
    drawn = [seed, of_mixing, fractals_version(mixing, seed)]
    fingerprint = digest("augmented", CODE_VERSION, raw.version, generated.version, *drawn)
    finished = finished_stage(out, fingerprint, layout_of(raw, settings.storage))
    if finished:
        return finished
    with fractals_in_a_file(settings, fractal_cache, aside, progress) as fractals:
        blend = _WithFractal(fractals, seed, mixing.lam)
        mixer = Mixer(raw.folder, generated.folder, settings, blend)
        return write_mixed(
            "augmented", fingerprint, drawn, mixer, raw, generated, out, aside, progress
        )


def _half_and_half(
    original: np.ndarray, edit: np.ndarray, mask: Mask, edit_key: str
) -> tuple[np.ndarray, dict[str, Any]]:
    return hybrid(original, edit, mask), {}


class Fractals(NamedTuple):
    """Fractals in a file that several processes read: uint8 (N, size, size, 3)."""

    file: Path
    names: list[str]

    def draw(self, seed: int, edit_key: str) -> tuple[str, np.ndarray]:
        """Return the name and the pixels of an edit's fractal."""
        name = draw(self.names, seed, "fractal", edit_key)
        return name, np.load(self.file, mmap_mode="r")[self.names.index(name)]


@contextmanager
def fractals_in_a_file(
    settings: Settings, cache: Path, aside: Path, progress: Progress
) -> Iterator[Fractals]:
    """Give the settings' fractals in a file that goes afterwards."""
    found = load_fractals(settings.mixing, settings.seed, settings.size, cache, progress)
    names = sorted(found)
    aside.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=aside, prefix="fractals-", suffix=".npy") as file:
        np.save(file, np.stack([found.pop(name) for name in names]))
        file.flush()
        yield Fractals(Path(file.name), names)


@dataclass(frozen=True)
class _WithFractal:
    fractals: Fractals
    seed: int
    lam: float

    def __call__(
        self, original: np.ndarray, edit: np.ndarray, mask: Mask, edit_key: str
    ) -> tuple[np.ndarray, dict[str, Any]]:
        name, fractal = self.fractals.draw(self.seed, edit_key)
        mixed = mix(original, edit, mask, fractal, self.lam)
        return mixed, {"fractal_id": name, "lam": self.lam}


@dataclass(frozen=True)
class Mixer:
    """Makes a part's images: `join` of each edit, its source and the mask drawn for it.

    The same part of `raw` holds the sources.
    """

    raw: Path
    generated: Path
    settings: Settings
    join: Join

    def __call__(self, part: str, threads: int) -> Iterator[StoredRow]:
        """Give each image's manifest row and bytes."""
        raw, generated = read_stage(self.raw), read_stage(self.generated)
        originals, edits = raw.files, generated.files
        file_names = raw.rows_of(part, ["image_id", "file_name"]).set_index("image_id")["file_name"]
        rows = generated.rows_of(part)
        if not rows["source_id"].isin(file_names.index).all():
            raise _other_images()
        rows["original"] = file_names.loc[rows["source_id"]].to_numpy()
        size, mixing = self.settings.size, self.settings.mixing
        names = sorted(mixing.masks)
        masks: dict[str, Mask] = {m: half_mask(m, size, size, mixing.seam) for m in names}

        def mixed(row: dict[str, Any]) -> StoredRow:
            mask = draw(names, self.settings.seed, "mask", row["edit_key"])
            original = originals.pixels(row.pop("original"), size)
            edit = edits.pixels(row["file_name"], size)
            pixels, drawn = self.join(original, edit, masks[mask], row["edit_key"])
            content = png_bytes(pixels)
            sha256 = hashlib.sha256(content).hexdigest()
            return {**row, "mask": mask, **drawn, "sha256": sha256}, content

        if threads == 1:
            yield from map(mixed, rows.to_dict("records"))
            return
        with ThreadPoolExecutor(threads) as pool:  # PIL and numpy let others run
            for start in range(0, len(rows), _AT_ONCE):
                yield from pool.map(mixed, rows[start : start + _AT_ONCE].to_dict("records"))


def write_mixed(
    name: str,
    fingerprint: str,
    drawn: Sequence[Any],
    mixer: Mixer,
    raw: Stage,
    generated: Stage,
    out: Path,
    aside: Path,
    progress: Progress,
) -> Stage:
    """Write one image for every edit; `drawn` is what they follow from beside rows and sources."""
    settings = mixer.settings
    layout, labels = layout_of(raw, settings.storage), class_names(raw.counts)
    total = generated.counts["images"]
    with write_stage(
        out, name=name, fingerprint=fingerprint, layout=layout, classes=labels, aside=aside
    ) as stage:
        of_all = [name, CODE_VERSION, *drawn, labels if layout.packed else None]
        parts = _parts(raw, generated, of_all)
        stage.write(parts, mixer, total=total, describe=f"Mixing {name} images", progress=progress)
    return read_stage(out)


def _parts(raw: Stage, generated: Stage, of_all: Sequence[Any]) -> Iterator[Part]:
    """Give the parts of what is made of `generated`: each of one part of it and of `raw`."""
    if raw.layout["parts"] != generated.layout["parts"]:
        raise _other_images()
    for name, edits in generated.parts.items():
        fingerprint = digest(*of_all, name, edits.version, raw.parts[name].version)
        yield Part(name, fingerprint, name, edits.images)


def _other_images() -> UserError:
    return UserError(
        "The edits in data/generated are of other images than data/raw holds now: make them anew "
        "first (`generated_images`)."
    )
