"""The third and fourth stage: an edit becomes a hybrid to look at, and an augmented image.

Masks and fractals are drawn here, after the edits: redrawing them costs no UNet evaluation. Both
stages start from the decoded source and the decoded edit, not from each other's files, so that
encodings do not pile up.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffusemix_pipeline.datasets.images import png_bytes, read_square
from diffusemix_pipeline.datasets.manifest import Stage, finished_stage, read_stage, write_stage
from diffusemix_pipeline.identity import digest, draw
from diffusemix_pipeline.mixing.blending import hybrid, mix
from diffusemix_pipeline.mixing.fractals import fractals_version, load_fractals
from diffusemix_pipeline.mixing.masks import half_mask
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Settings

CODE_VERSION = "1"

Join = Callable[[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]], np.ndarray]
"""Joins an original, an edit and the original's mask, and may add to the manifest row."""


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
        original: np.ndarray, edit: np.ndarray, mask: np.ndarray, row: dict[str, Any]
    ) -> np.ndarray:
        return hybrid(original, edit, mask)

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
        original: np.ndarray, edit: np.ndarray, mask: np.ndarray, row: dict[str, Any]
    ) -> np.ndarray:
        name = draw(names, seed, "fractal", row["edit_key"])
        row.update(fractal_id=name, lam=mixing.lam)
        return mix(original, edit, mask, fractals[name], mixing.lam)

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
    masks = {mask: half_mask(mask, size, size, mixing.seam) for mask in mixing.masks}
    sources = dict(raw.manifest()[["image_id", "file_name"]].itertuples(index=False))
    edits = generated.manifest().to_dict("records")
    with write_stage(out, name=name, fingerprint=fingerprint, aside=aside) as stage:
        for done, row in enumerate(edits, start=1):
            row["mask"] = draw(sorted(masks), settings.seed, "mask", row["edit_key"])
            original = read_square(raw.folder / sources[row["source_id"]], size)
            edit = read_square(generated.folder / row["file_name"], size)
            content = png_bytes(join(original, edit, masks[row["mask"]], row))
            target = stage.folder / row["file_name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            stage.rows.append({**row, "sha256": hashlib.sha256(content).hexdigest()})
            progress(f"Mixing {name} images", done, len(edits))
    return read_stage(out)
