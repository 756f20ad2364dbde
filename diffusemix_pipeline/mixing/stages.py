"""The third and fourth stage: an edit becomes a hybrid to look at, and an augmented image.

Masks and fractals are drawn here, after the edits: redrawing them costs no UNet evaluation. Both
stages start from the decoded source and the decoded edit, not from each other's files, so that
encodings do not pile up.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from diffusemix_pipeline.datasets.images import png_bytes, read_square
from diffusemix_pipeline.datasets.manifest import (
    CHUNK_ROWS,
    Stage,
    finished_stage,
    read_stage,
    write_stage,
)
from diffusemix_pipeline.devices import usable_cores
from diffusemix_pipeline.identity import digest, draw
from diffusemix_pipeline.mixing.blending import hybrid, mix
from diffusemix_pipeline.mixing.fractals import fractals_version, load_fractals
from diffusemix_pipeline.mixing.masks import Mask, half_mask
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings

CODE_VERSION = "2"

Join = Callable[[np.ndarray, np.ndarray, Mask, str], tuple[np.ndarray, dict[str, Any]]]
"""Joins an original, an edit and the mask by the edit's key; says what else it drew."""


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
    fingerprint = digest(
        "hybrid", CODE_VERSION, raw.version, generated.version, settings.seed, masks
    )

    def join(
        original: np.ndarray, edit: np.ndarray, mask: Mask, edit_key: str
    ) -> tuple[np.ndarray, dict[str, Any]]:
        return hybrid(original, edit, mask), {}

    return _mixed("hybrid", fingerprint, join, raw, generated, settings, out, aside, progress)


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
    drawn = mixing.model_dump(include={"masks", "seam", "lam"})
    fractal_set = fractals_version(mixing, seed)
    fingerprint = digest(
        "augmented", CODE_VERSION, raw.version, generated.version, seed, drawn, fractal_set
    )
    finished = finished_stage(out, fingerprint)
    if finished:
        return finished
    fractals = load_fractals(mixing, seed, settings.size, fractal_cache, progress)
    names = sorted(fractals)

    def join(
        original: np.ndarray, edit: np.ndarray, mask: Mask, edit_key: str
    ) -> tuple[np.ndarray, dict[str, Any]]:
        name = draw(names, seed, "fractal", edit_key)
        mixed = mix(original, edit, mask, fractals[name], mixing.lam)
        return mixed, {"fractal_id": name, "lam": mixing.lam}

    return _mixed("augmented", fingerprint, join, raw, generated, settings, out, aside, progress)


def _mixed(
    name: str,
    fingerprint: str,
    join: Join,
    raw: Stage,
    generated: Stage,
    settings: Settings,
    out: Path,
    aside: Path,
    progress: Progress,
) -> Stage:
    """Write one image for every edit: `join` of its source, itself and the mask drawn for it."""
    finished = finished_stage(out, fingerprint)
    if finished:
        return finished
    size, mixing = settings.size, settings.mixing
    names = sorted(mixing.masks)
    masks: dict[str, Mask] = {m: half_mask(m, size, size, mixing.seam) for m in names}
    sources = raw.manifest(["image_id", "file_name"]).set_index("image_id")["file_name"]
    edits = generated.manifest()

    def mixed(row: dict[str, Any], original_name: str, folder: Path) -> dict[str, Any]:
        """Write the image of an edit's row, and return its own row."""
        mask = draw(names, settings.seed, "mask", row["edit_key"])
        original = read_square(raw.folder / original_name, size)
        edit = read_square(generated.folder / row["file_name"], size)
        pixels, drawn = join(original, edit, masks[mask], row["edit_key"])
        content = png_bytes(pixels)
        target = folder / row["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return {**row, "mask": mask, **drawn, "sha256": hashlib.sha256(content).hexdigest()}

    with (
        write_stage(out, name=name, fingerprint=fingerprint, aside=aside) as stage,
        ThreadPoolExecutor(usable_cores()) as threads,  # PIL and numpy let others run
    ):
        done = 0
        for start in range(0, len(edits), CHUNK_ROWS):
            rows = edits[start : start + CHUNK_ROWS].to_dict("records")
            originals = sources.loc[[row["source_id"] for row in rows]]
            for row in threads.map(mixed, rows, originals, repeat(stage.folder)):
                stage.add(row)
                done += 1
                progress(f"Mixing {name} images", done, len(edits))
        del sources, edits  # the stage's own manifest takes their place
    return read_stage(out)
