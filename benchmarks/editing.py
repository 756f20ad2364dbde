"""How fast editing is, beside a plain loop that does what the authors' script does.

`python -m benchmarks.editing` edits the same images under the same schedule both ways, by turns in
one run, and prints ratios; then it measures mixing (`mixing.py`). Whatever else runs disturbs both
sides alike.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import mixing
from diffusemix_pipeline.bundled_editor.sources import make_pictures, read_image_folder
from diffusemix_pipeline.datasets.images import read_square
from diffusemix_pipeline.datasets.storage import StoredFiles
from diffusemix_pipeline.devices import choose_device
from diffusemix_pipeline.editing.editor import load_editor, locate_editor
from diffusemix_pipeline.editing.planning import PlannedEdit, SourceImage
from diffusemix_pipeline.editing.sampling import Sampler, workers_on
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.identity import file_sha256
from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.settings import PAPER_PROMPTS, Editing, Settings

SAME_SCHEDULE = {"sampler": "euler_ancestral", "steps": 100}


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--editor", default="bundled", help="a folder (default: bundled)")
    parser.add_argument("--images", type=Path, help="class folders (default: made pictures)")
    parser.add_argument("--size", type=int, default=32, help="px (default: 32, the demo's)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--reference",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="beside the authors' loop, which takes most of the time",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    parser.add_argument("--quick", action="store_true", help="a few minutes, fewer rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if options.reference:
        figures |= measure_tiers(options)
    figures |= mixing.measure(quick=options.quick)
    for name, value in figures.items():
        print(f"{name}: {value}", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(figures))


def measure_tiers(options: argparse.Namespace) -> dict[str, Any]:
    """Time the reference loop, the same schedule and the faster tiers, by turns, on one editor."""
    device = choose_device(options.device)
    folder = locate_editor(options.editor, None)
    tiers = {"same_schedule": SAME_SCHEDULE, "balanced": _tier("balanced"), "turbo": _tier("turbo")}
    workers = workers_on(device)
    seconds: dict[str, list[float]] = {name: [] for name in ("reference", *tiers)}
    differences = []
    with tempfile.TemporaryDirectory() as scratch:
        planned = _edits(Path(scratch), options, count=options.batch_size * max(2, workers))
        reference = reference_loop(folder, device)
        reference(planned[-1])  # untimed, as the first call of anything is slower
        samplers = {
            name: _warm_sampler(folder, device, options, overrides, planned[-1])
            for name, overrides in tiers.items()
        }
        for turn in range(1 if options.quick else 3):
            few = planned[turn * 2 : turn * 2 + 2]
            theirs, took = _timed(list, map(reference, few))
            seconds["reference"].append(took / len(few))
            for name, sampler in samplers.items():
                store = EditStore(Path(scratch) / f"{name}{turn}")
                _, took = _timed(sampler.make, planned, len(planned), store, silent)
                seconds[name].append(took / len(planned))
                if name == "same_schedule":
                    ours = [read_square(store.path(edit.key), options.size) for edit in few]
                    pairs = zip(theirs, ours, strict=True)
                    differences += [np.abs(np.asarray(a, int) - b).mean() for a, b in pairs]
    ratios = {
        f"ratio_{name}": median(
            slow / fast for slow, fast in zip(seconds["reference"], seconds[name], strict=True)
        )
        for name in tiers
    }
    return {
        "editor": options.editor,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{workers} CPU threads",
        "size": options.size,
        "batch_size": options.batch_size,
        "images_per_second": {name: 1 / median(each) for name, each in seconds.items()},
        "unet_evaluations": {
            name: Editing(**overrides).unet_evaluations for name, overrides in tiers.items()
        },
        **ratios,
        "difference_to_reference_255": {
            "mean": float(np.mean(differences)),
            "of the image that differs most": float(np.max(differences)),
        },
    }


def reference_loop(folder: Path, device: str) -> Callable[[PlannedEdit], Image.Image]:
    """Return what the authors' script does for one image and one prompt, PIL in and out.

    One call of the pipeline with the library's default 100 Euler-ancestral steps; half precision
    on CUDA as theirs, float32 on a CPU, where theirs would not run. Guidance is the editor's, and
    the seed is set, so that the results can be compared.
    """
    from diffusers import (
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
    )

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        folder,
        dtype=torch.float16 if device == "cuda" else torch.float32,
        use_safetensors=True,
        safety_checker=None,
        requires_safety_checker=False,
    ).to(device)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    defaults = Editing()

    def edit(planned: PlannedEdit) -> Image.Image:
        return pipeline(
            planned.instruction,
            image=Image.open(io.BytesIO(planned.source.content())).convert("RGB"),
            guidance_scale=defaults.guidance,
            image_guidance_scale=defaults.image_guidance,
            generator=torch.Generator().manual_seed(planned.seed),
        ).images[0]

    return edit


def _tier(preset: str) -> dict[str, Any]:
    """Return the schedule of a preset; its guidance scales suit the checkpoint that it names."""
    editing = load_settings(Path("/nonexistent"), preset=preset, environment={}).editing
    return editing.model_dump(include={"sampler", "steps", "guidance_from", "guidance_until"})


def _warm_sampler(
    folder: Path,
    device: str,
    options: argparse.Namespace,
    overrides: dict[str, Any],
    first: PlannedEdit,
) -> Sampler:
    """Load an editor and make one edit, untimed."""
    chosen = Editing(batch_size=options.batch_size, compile=options.compile, **overrides)
    editor = load_editor(folder, chosen, device)
    image = first.source.read(options.size)
    shape = options.batch_size if options.compile else 1  # what is compiled is for one shape
    editor.edit(np.stack([image] * shape), [first.instruction] * shape, [first.seed] * shape)
    settings = Settings(size=options.size, editing=chosen)
    return Sampler(editor, device, settings, options.batch_size)


def _edits(scratch: Path, options: argparse.Namespace, count: int) -> Sequence[PlannedEdit]:
    """Write images, and plan an edit of each under one of the paper's prompts."""
    if options.images:
        pixels, _ = read_image_folder(options.images, options.size)
        pixels = pixels[np.linspace(0, len(pixels) - 1, count).astype(int)]
    else:
        pixels = make_pictures(count, options.size, np.random.default_rng(0))
    edits = []
    for number, image in enumerate(pixels):
        path = scratch / f"{number}.png"
        Image.fromarray(image).save(path)
        prompt = PAPER_PROMPTS[number % len(PAPER_PROMPTS)]
        instruction = Editing().template.format(prompt=prompt)
        source = SourceImage(
            str(number), "all", StoredFiles(scratch), path.name, file_sha256(path), ""
        )
        edits.append(PlannedEdit(f"{number:032x}", source, prompt, instruction, 0, 0, number))
    return edits


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
