"""How fast mixing is, what its files cost, and how little memory it holds.

What belongs here: measurements of `mixing/`, of the codec and of the stages that walk a dataset.
What does not: edits, and assertions about time; a test that fails on a busy machine says nothing.

    python -m benchmarks.mixing [--quick] [--json] [--images DIR]

Times are compared only with times taken a moment before or after, in pairs: a busy machine slows
both.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
from PIL import Image

from diffusemix_pipeline.datasets.images import decode_square, png_bytes
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.manifest import (
    MANIFEST,
    Stage,
    read_manifest,
    read_stage,
)
from diffusemix_pipeline.datasets.storage import StoredFiles
from diffusemix_pipeline.devices import usable_cores
from diffusemix_pipeline.editing import generate
from diffusemix_pipeline.editing.generate import LabelGate, collect_edits, make_edits
from diffusemix_pipeline.editing.planning import Plan, plan_edits
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.mixing.blending import mix
from diffusemix_pipeline.mixing.fractals import make_fractal
from diffusemix_pipeline.mixing.masks import half_mask
from diffusemix_pipeline.mixing.stages import make_augmented
from diffusemix_pipeline.settings import Settings

ROWS = (1_000, 50_000)
_PLANNED = ["image_id", "label", "file_name", "sha256", "source_sha256"]
# The manifests that a stage works with, and the columns of them.
_MANIFESTS: dict[str, dict[str, list[str] | None]] = {
    "raw": {"raw": None},
    "teachers": {"raw": _PLANNED},
    "made": {"raw": _PLANNED},
    "generated": {"raw": _PLANNED, "generated": None},
    "augmented": {"raw": ["image_id", "file_name"], "generated": None, "augmented": None},
}
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"PNG, level {level}": ("PNG", {"compress_level": level}) for level in range(10)},
    "PNG, Huffman only": ("PNG", {"compress_type": 2}),
    "PNG, run lengths": ("PNG", {"compress_type": 3}),
    **{
        f"WebP lossless, method {method}": (
            "WEBP",
            {"lossless": True, "method": method, "quality": 0},
        )
        for method in (0, 1, 2, 4)
    },
    "JPEG, quality 95, 4:4:4": ("JPEG", {"quality": 95, "subsampling": 0}),
}


# Mixing, arrays alone ---------------------------------------------------------------------------


def arrays(*, quick: bool = False) -> dict[str, Any]:
    """Time one half mask and one fractal at 256 px, against the published code's way.

    `ratio_mixing_arrays` compares what each does between decoding and encoding: the published code
    turns PIL images into float arrays and back, twice; this package starts from the arrays that its
    decoder gives. `ratio_with_conversions` adds to this package's time PIL image to array, twice,
    and array to PIL image.
    """
    pixels = _made_pictures(3, 256, seed=0)
    pictures = [Image.fromarray(one) for one in pixels]
    original, edit, fractal = pixels
    mask = half_mask("left", 256, 256)

    def with_conversions() -> Image.Image:
        first, second = (np.array(picture) for picture in pictures[:2])
        return Image.fromarray(mix(first, second, mask, fractal, 0.2))

    published, ours, converted = _paired_seconds(
        [
            lambda: _published_mix(*pictures),
            lambda: mix(original, edit, mask, fractal, 0.2),
            with_conversions,
        ],
        repetitions=10 if quick else 50,
        loops=10,
    )
    return {
        "ratio_mixing_arrays": _median_ratio(published, ours),
        "ratio_with_conversions": _median_ratio(published, converted),
        "published_ms": 1e3 * min(published),
        "ours_ms": 1e3 * min(ours),
        "repetitions": 10 * len(ours),
    }


def _arrays_in_a_process_of_their_own(*, quick: bool) -> dict[str, Any]:
    """Measure `arrays` where nothing ran before.

    A heap that has grown, as after sampling, spares the published code's large arrays the kernel's
    zeroing of new pages: there it takes 1.5 ms where it takes 5 in a fresh process.
    """
    command = [sys.executable, "-m", "benchmarks.mixing", "--arrays", *(["--quick"] * quick)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def _published_mix(original: Image.Image, edit: Image.Image, fractal: Image.Image) -> Image.Image:
    """Do what the published code does after the edit (research code of the paper's authors).

    It builds the mask anew for each image, a seam of 20 px in it, in float64 and three channels;
    joins in [0, 1]; goes through a PIL image; blends in float32, and truncates both times.
    """
    width, height = original.size
    flat = (width - 20) // 2
    ramp = np.concatenate([np.zeros(flat), np.linspace(0, 1, 20), np.ones(flat)])
    of_edit = np.tile(np.tile(ramp, (height, 1))[..., None], (1, 1, 3))
    first, second = (np.array(image, dtype=np.float32) / 255 for image in (original, edit))
    joined = (1 - of_edit) * first + of_edit * second
    hybrid = Image.fromarray(np.clip(joined * 255, 0, 255).astype(np.uint8))
    below = np.array(hybrid, dtype=np.float32)
    above = np.array(fractal.resize(hybrid.size), dtype=np.float32)
    blend = 0.8 * below + 0.2 * above
    return Image.fromarray(np.clip(blend, 0, 255).astype(np.uint8))


# The codec --------------------------------------------------------------------------------------


def codec(images: Path | None = None, *, quick: bool = False) -> dict[str, Any]:
    """Time what might hold the pictures: ms to encode, ms to decode and bytes, by size and codec.

    Half of the pictures are as they are, half with a fractal blended in. They come from the folder
    `images`, else they are made.
    """
    rows = []
    for size in (32, 256) if quick else (32, 64, 256, 512):
        pictures = _pictures_to_encode(images, size, count=4 if quick else 24)
        for name, (kind, options) in CODECS.items():
            seconds = [_codec_seconds(one, kind, options, 1 if quick else 3) for one in pictures]
            encode, decode, size_bytes = np.mean(seconds, axis=0)
            rows.append(
                {
                    "size": size,
                    "codec": name,
                    "encode_ms": 1e3 * encode,
                    "decode_ms": 1e3 * decode,
                    "bytes": int(size_bytes),
                }
            )
    return {"codec_table": rows, "codec_pictures": "a folder's" if images else "made"}


def _pictures_to_encode(images: Path | None, size: int, count: int) -> Sequence[np.ndarray]:
    if images:
        from diffusemix_pipeline.bundled_editor.sources import read_image_folder

        found = read_image_folder(images, size)[0]
        plain = found[:: max(len(found) // count, 1)][:count]
    else:
        plain = _made_pictures(count, size, seed=0)
    keep_all = half_mask("left", size, size)
    return [
        mix(one, one, keep_all, make_fractal(number, size), 0.2) if number % 2 else one
        for number, one in enumerate(plain)
    ]


def _codec_seconds(
    pixels: np.ndarray, kind: str, options: dict[str, Any], repetitions: int
) -> tuple[float, float, int]:
    encode, decode = [], []
    for _ in range(repetitions):
        began = time.perf_counter()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **options)
        encode.append(time.perf_counter() - began)
        began = time.perf_counter()
        with Image.open(buffer) as image:
            np.array(image.convert("RGB"))
        decode.append(time.perf_counter() - began)
    return min(encode), min(decode), len(buffer.getvalue())


# A stage against its codec ----------------------------------------------------------------------


def throughput(size: int = 256, *, quick: bool = False) -> dict[str, Any]:
    """Compare `make_augmented` with nothing but its decoding and encoding, on as many threads.

    `codec_fraction` is the stage's throughput over the codec's: two files read an image, one
    encoded in memory. Reading the fractals is left out, everything else of the stage counts.
    """
    count = min((256 if quick else 2048) * (256 // size), 4096)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        settings = _settings(size)
        raw, generated = _stages(here, count, settings)
        stage, codec_alone = [], []
        _stage_seconds(here, "augmented", raw, generated, settings)  # imports, makes the fractals
        for number in range(3):
            stage.append(_stage_seconds(here, f"augmented-{number}", raw, generated, settings))
            codec_alone.append(_codec_alone_seconds(here / "augmented", raw, generated, size))
    return {
        "codec_fraction": _median_ratio(codec_alone, stage),
        "size": size,
        "images": count,
        "images_per_second": count / min(stage),
        "threads": usable_cores(),
    }


def _stage_seconds(
    here: Path, name: str, raw: Stage, generated: Stage, settings: Settings
) -> float:
    began = time.perf_counter()

    def progress(description: str, done: int, total: int) -> None:
        nonlocal began
        if description == "Making fractals":
            began = time.perf_counter()

    make_augmented(
        raw,
        generated,
        settings,
        here / name,
        fractal_cache=here / "fractals",
        aside=here / "aside",
        progress=progress,
    )
    return time.perf_counter() - began


def _codec_alone_seconds(augmented: Path, raw: Stage, generated: Stage, size: int) -> float:
    names = dict(raw.manifest(["image_id", "file_name"]).itertuples(index=False))
    edits = generated.manifest()
    originals = [names[source] for source in edits["source_id"]]
    edited = edits["file_name"]
    made = StoredFiles(augmented)
    some = [decode_square(made.read(name), size) for name in edits["file_name"][:256]]
    results = islice(cycle(some), len(edits))

    def coded(original: str, edit: str, result: np.ndarray) -> None:
        decode_square(raw.files.read(original), size)
        decode_square(generated.files.read(edit), size)
        png_bytes(result)

    with ThreadPoolExecutor(usable_cores()) as threads:
        began = time.perf_counter()
        list(threads.map(coded, originals, edited, results))
        return time.perf_counter() - began


# Memory -----------------------------------------------------------------------------------------


def memory() -> dict[str, Any]:
    """Measure how much more memory the stages hold for 50,000 images than for 1,000.

    Each stage runs in a process of its own, whose peak of resident memory the kernel tells (Linux).
    `rss_growth_mb` is the largest growth, less the manifests that a stage works with: its own, and
    the columns that it reads of those before. `manifest_bytes_per_row` is the largest whole one.
    Images are PNG files of 16 px, all different. The label gate is on, with teachers that were
    trained for a few steps. Edits are "made" by no editor, for its memory is its own.
    """
    few, many = ROWS
    peaks: dict[tuple[str, int], int] = {}
    manifests: dict[str, pd.Series] = {}
    for count in (few, many):
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            _write_source(here / "source", count, 16)
            for stage in _MANIFESTS:
                peaks[stage, count] = _peak_bytes(stage, here)
                if (here / stage / MANIFEST).exists():
                    rows = read_manifest(here / stage)
                    manifests[stage] = rows.memory_usage(index=False, deep=True) / len(rows)
    grown = {stage: peaks[stage, many] - peaks[stage, few] for stage in _MANIFESTS}
    aside = {
        stage: grown[stage]
        - (many - few)
        * sum(manifests[name][columns or slice(None)].sum() for name, columns in read.items())
        for stage, read in _MANIFESTS.items()
    }
    return {
        "rss_growth_mb": max(aside.values()) / 1e6,
        "manifest_bytes_per_row": max(float(sizes.sum()) for sizes in manifests.values()),
        "rss_growth_mb_by_stage": {stage: grown[stage] / 1e6 for stage in grown},
        "rss_growth_mb_less_manifests_by_stage": {stage: aside[stage] / 1e6 for stage in aside},
    }


def _peak_bytes(stage: str, here: Path) -> int:
    """Run one stage in a process of its own and return the peak of its resident memory."""
    command = [sys.executable, "-m", "benchmarks.mixing", "--peak", stage, str(here)]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(told.stdout)


def _run_for_peak(stage: str, here: Path) -> int:
    settings = _settings(16, gate=True)
    if stage == "raw":
        _ingested(here, settings)
    elif stage == "teachers":
        gate = _gate(here, plan_edits(read_stage(here / "raw"), settings))
        assert gate
        gate.fit()
    elif stage == "made":
        _make_with_no_editor(here, settings)
    elif stage == "generated":
        _collected(here, settings)
    else:
        raw, generated = read_stage(here / "raw"), read_stage(here / "generated")
        _stage_seconds(here, "augmented", raw, generated, settings)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# Datasets to measure on -------------------------------------------------------------------------


def _settings(size: int, *, gate: bool = False) -> Settings:
    """Return settings with all images, and with a gate that rejects by its teachers alone."""
    bounds = {"min_change": 0, "max_change": 1}
    return Settings.model_validate(
        {
            "size": size,
            "source": {"train_per_class": None},
            "editing": {"gate": {"enabled": gate, **bounds}},
            "training": {"steps": 2},
        }
    )


def _stages(here: Path, count: int, settings: Settings) -> tuple[Stage, Stage]:
    _write_source(here / "source", count, settings.size)
    raw = _ingested(here, settings)
    _make_with_no_editor(here, settings)
    return raw, _collected(here, settings)


def _ingested(here: Path, settings: Settings) -> Stage:
    """Ingest the source, all of it for training."""
    source = str(here / "source")
    return ingest(source, settings, here / "raw", aside=here / "aside", train_only=True)


def _write_source(folder: Path, count: int, size: int) -> None:
    for number, pixels in enumerate(different_pictures(count, size, seed=0)):
        path = folder / f"class-{number % 10}" / f"image-{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(pixels))


class NoEditor:
    """Stands where an editor does, and costs nothing: an edit is its source, nearly."""

    def edit(
        self, images: np.ndarray, instructions: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray:
        return images ^ 1

    def check_instruction(self, instruction: str) -> None:
        pass

    def profile(self) -> dict[str, Any]:
        return {"made": "by no editor"}


def _gate(here: Path, plan: Plan) -> LabelGate | None:
    """Return the label gate where it is on."""
    if not plan.gate:
        return None
    # Imported here: it brings torch, which processes that neither make nor judge do without.
    from diffusemix_pipeline.training.fold_teachers import label_gate

    raw, aside = read_stage(here / "raw"), here / "aside"
    return label_gate(plan, raw, folder=here / "gate", aside=aside, device="cpu")


def _make_with_no_editor(here: Path, settings: Settings) -> None:
    """Plan all edits, fill the store with them as an editor's are, and let the gate judge them."""
    from diffusemix_pipeline.editing.sampling import Sampler  # torch, as above

    plan, store = plan_edits(read_stage(here / "raw"), settings), EditStore(here / "edits")
    sampler = Sampler(NoEditor(), "cpu", settings, 32)
    with patch.object(generate, "load_sampler", lambda plan, device: sampler):
        make_edits(plan, store=store, device="cpu", gate=_gate(here, plan))


def _collected(here: Path, settings: Settings) -> Stage:
    """Plan the edits and collect them from the store: the whole of a stage that makes none."""
    plan = plan_edits(read_stage(here / "raw"), settings)
    store = EditStore(here / "edits")
    verdicts = plan.verdicts(here / "gate") if plan.gate else None
    return collect_edits(plan, here / "generated", store, verdicts, here / "aside")


def _made_pictures(count: int, size: int, seed: int) -> np.ndarray:
    """Return uint8 (count, size, size, 3)."""
    # Imported here: it brings torch, which the processes whose memory is measured do without.
    from diffusemix_pipeline.bundled_editor.sources import make_pictures

    return make_pictures(count, size, np.random.default_rng(seed))


def different_pictures(count: int, size: int, seed: int) -> Iterable[np.ndarray]:
    """Make `count` pictures from pairs of some thirty, one moved about, and numbered."""
    pictures = _made_pictures(30, size, seed)
    for number in range(count):
        moves = number // 30**2
        moved = np.roll(pictures[number % 30], (5 * moves % size, 11 * moves % size), axis=(0, 1))
        both = moved // 2 + pictures[number // 30 % 30] // 2
        both[0, 0] = number % 256, number // 256 % 256, number // 65536
        yield both


# Timing -----------------------------------------------------------------------------------------


def _paired_seconds(
    functions: Sequence[Callable[[], object]], repetitions: int, loops: int
) -> list[list[float]]:
    """Time a few calls of each function in turn, so that a busy machine slows all of them.

    Between single calls one function's memory would cost the other's time: what it gives back to
    the kernel, the next has to ask for.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repetitions):
        for function, its in zip(functions, seconds, strict=True):
            began = time.perf_counter()
            for _ in range(loops):
                function()
            its.append((time.perf_counter() - began) / loops)
    return seconds


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


# By hand ----------------------------------------------------------------------------------------


def measure(images: Path | None = None, *, quick: bool = False) -> dict[str, Any]:
    """Take all the measurements of this module."""
    return {
        "quick": quick,
        **_arrays_in_a_process_of_their_own(quick=quick),
        **codec(images, quick=quick),
        "codec_fraction": (at_256_px := throughput(256, quick=quick))["codec_fraction"],
        "throughput_256_px": at_256_px,
        "throughput_32_px": throughput(32, quick=quick),
        **memory(),
    }


def main() -> None:
    """Print the measurements, the codec's as a table; with --json, one JSON object last."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller stages")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    parser.add_argument("--images", type=Path, help="class folders of photographs for the codec")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--arrays", action="store_true", help="the arrays' figures alone")
    asked = parser.parse_args()
    if asked.arrays:
        print(json.dumps(arrays(quick=asked.quick)))
        return
    if asked.peak:
        print(_run_for_peak(asked.peak[0], Path(asked.peak[1])))
        return
    result = measure(asked.images, quick=asked.quick)
    for name, value in result.items():
        if name != "codec_table":
            print(f"{name}: {value}")
    print("| px | codec | encode, ms | decode, ms | bytes |\n|---|---|---|---|---|")
    for row in result["codec_table"]:
        print("| {size} | {codec} | {encode_ms:.2f} | {decode_ms:.2f} | {bytes} |".format(**row))
    if asked.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
