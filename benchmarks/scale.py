"""What an image costs as datasets grow, through the first four assets: 1,000 to 100,000 images.

    python -m benchmarks.scale [--images 1000,10000,100000] [--size 32] [--set KEY=VALUE]

Synthetic JPEGs, all different, and an editor that costs nothing: what is left is what the pipeline
itself does. Each run is a process of its own, through Dagster, whose peak of resident memory the
kernel tells: all anew, once more with nothing changed, and with one image added. Beside it, what
DVC takes to add and to look at the data. Everything lies in a temporary folder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
from PIL import Image

from benchmarks.mixing import NoEditor, different_pictures
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import load_settings

ASSETS = ("raw_dataset", "generated_images", "hybrid_images", "fractal_augmented_dataset")
_CLASSES = 10
_TEST_SHARE = 0.1


def measure(count: int, size: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Run everything on `count` images: seconds, peak memory in MB, files, DVC's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        write_source(here / "source", count, size)
        project = Project(here / "project")
        project.root.mkdir()
        own = [f"source.path={here / 'source'}", f"size={size}", *overrides]
        anew = _run_apart(project, own)
        again = _run_apart(project, own)
        # One for training: the image with number `count` would be one for test.
        write_source(here / "source", count + 2, size, start=count + 1)
        added = _run_apart(project, own)
        return {
            "images": count,
            "anew_s": anew["seconds"],
            "anew_ms_an_image": 1e3 * anew["seconds"] / count,
            "again_s": again["seconds"],
            "one_more_s": added["seconds"],
            "peak_mb": max(anew["peak_mb"], again["peak_mb"], added["peak_mb"]),
            "files": sum(1 for path in project.data.rglob("*") if path.is_file()),
            "dvc_add_s": _seconds(project.root, ["add", "data"]),
            "dvc_status_s": _seconds(project.root, ["status"]),
            "by_asset": anew["by_asset"],
            "again_by_asset": again["by_asset"],
            "one_more_by_asset": added["by_asset"],
        }


def write_source(folder: Path, count: int, size: int, start: int = 0) -> None:
    """Write the images from number `start` on as JPEG, a tenth of them for test."""
    for number, pixels in enumerate(different_pictures(count, size, seed=0)):
        if number >= start:
            split = "test" if number % round(1 / _TEST_SHARE) == 0 else "train"
            label = f"class-{number // round(1 / _TEST_SHARE) % _CLASSES}"
            path = folder / split / label / f"image-{number:07d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=95)


def _run_apart(project: Project, overrides: Sequence[str]) -> dict[str, Any]:
    sets = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "benchmarks.scale", "--within", str(project.root), *sets]
    began = time.monotonic()
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"seconds": time.monotonic() - began, **json.loads(told.splitlines()[-1])}


def run_assets(project: Project, overrides: Sequence[str]) -> dict[str, Any]:
    """Materialize the four assets in this process, without an editor; its peak, seconds by step."""
    import dagster as dg

    from diffusemix_pipeline.editing import generate
    from diffusemix_pipeline.editing.sampling import Sampler
    from diffusemix_pipeline.orchestration.build import build_definitions
    from diffusemix_pipeline.orchestration.launch import prepare_instance
    from diffusemix_pipeline.progress import silent

    settings = load_settings(project.root, overrides=overrides, environment={})
    prepare_instance(project)
    sampler = Sampler(NoEditor(), "cpu", settings, 32)
    with (
        patch.object(generate, "load_sampler", lambda plan, device: sampler),
        patch("diffusemix_pipeline.editing.cost.load_sampler", lambda plan, device: sampler),
        dg.DagsterInstance.get() as instance,
    ):
        definitions = build_definitions(project, settings, lambda log: silent)
        job = definitions.resolve_implicit_global_asset_job_def()
        done = job.execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey(name) for name in ASSETS],
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
        steps = {step.step_key: step for step in instance.get_run_step_stats(done.run_id)}
    took = pd.Series({key: (s.end_time or 0) - (s.start_time or 0) for key, s in steps.items()})
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return {"peak_mb": peak, "by_asset": took.round(1).to_dict()}


def _seconds(root: Path, command: Sequence[str]) -> float:
    began = time.monotonic()
    dvc = [sys.executable, "-m", "dvc", *command]
    subprocess.run(dvc, cwd=root, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default="1000,10000,100000")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.within:
        print(json.dumps(run_assets(Project(options.within), options.overrides)))
        return
    for count in options.images.split(","):
        print(json.dumps(measure(int(count), options.size, options.overrides)), flush=True)


if __name__ == "__main__":
    main()
