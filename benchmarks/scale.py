"""What an image costs as datasets grow, through the first four assets: 1,000 to 100,000 images.

    python -m benchmarks.scale [--images 1000,10000,100000] [--size 32] [--set KEY=VALUE]
    python -m benchmarks.scale --workers [--images 10000] [--size 32] [--first-stage]

Synthetic JPEGs, all different, an editor that costs nothing and no label gate, whose teachers are
trained: what is left is what the pipeline itself does. Each run is a process of its own, through
Dagster: all anew, once more with nothing changed, and with one image added. Its peak of resident
memory is told by the kernel; that of it and its workers together, what they share counted once, is
looked at every half second, which misses short peaks. Beside it, what DVC takes to add the data for
the first time, and to look at them. Everything lies in a temporary folder.

The second compares two workers of one stage with two copies of the work that know nothing of each
other, a core each, in turns: how much faster per worker could they be? The first stage computes so
little that a disk may not keep up with it: TMPDIR names a folder in memory, where it is alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import harmonic_mean
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pandas as pd
import psutil
from PIL import Image

from benchmarks.mixing import NoEditor, different_pictures
from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

if TYPE_CHECKING:
    import dagster as dg

ASSETS = ("raw_dataset", "generated_images", "hybrid_images", "fractal_augmented_dataset")
_CLASSES = 10
_PAIRS = 3


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
        write_source(here / "source", count + 3, size, start=count + 2)  # one for training
        added = _run_apart(project, own)
        runs = [anew, again, added]
        files = sum(1 for path in project.data.rglob("*") if path.is_file())
        # As if nothing was known of the data.
        shutil.rmtree(project.root / ".dvc" / "cache")
        (project.root / "data.dvc").unlink()
        return {
            "images": count,
            "anew_s": anew["seconds"],
            "anew_ms_an_image": 1e3 * anew["seconds"] / count,
            "again_s": again["seconds"],
            "one_more_s": added["seconds"],
            **{peak: max(run[peak] for run in runs) for peak in ("peak_mb", "peak_of_all_mb")},
            "files": files,
            "dvc_add_s": _seconds(project.root, ["add", "data"], here / "dvc"),
            "dvc_status_s": _seconds(project.root, ["status"], here / "dvc"),
            "by_asset": anew["by_asset"],
            "again_by_asset": again["by_asset"],
            "one_more_by_asset": added["by_asset"],
        }


def write_source(folder: Path, count: int, size: int, start: int = 0) -> None:
    """Write the images from number `start` on as JPEG: of twenty, two for test, one for val."""
    for number, pixels in enumerate(different_pictures(count, size, seed=0)):
        if number >= start:
            split = {0: "test", 1: "val", 10: "test"}.get(number % 20, "train")
            label = f"class-{number // 10 % _CLASSES}"
            path = folder / split / label / f"image-{number:07d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=95)


def _run_apart(project: Project, overrides: Sequence[str]) -> dict[str, Any]:
    sets = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "benchmarks.scale", "--within", str(project.root), *sets]
    began, peak = time.monotonic(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        while running.poll() is None:
            peak = max(peak, _megabytes_of_all(psutil.Process(running.pid)))
            time.sleep(0.5)
        assert running.stdout is not None
        told = json.loads(running.stdout.read().splitlines()[-1])
    assert running.returncode == 0
    return {"seconds": time.monotonic() - began, "peak_of_all_mb": peak, **told}


def _megabytes_of_all(process: psutil.Process) -> float:
    """Return the memory of a process and all that it started; what they share counts once."""
    bytes_of_all = 0
    with suppress(psutil.NoSuchProcess):
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                bytes_of_all += each.memory_full_info().pss
    return bytes_of_all / 1e6


def run_assets(project: Project, overrides: Sequence[str]) -> dict[str, Any]:
    """Materialize the four assets in this process, without an editor; its peak, seconds by step."""
    import dagster as dg

    from diffusemix_pipeline.editing import generate
    from diffusemix_pipeline.editing.sampling import Sampler
    from diffusemix_pipeline.orchestration.launch import prepare_instance

    settings = load_settings(project.root, overrides=overrides, environment={})
    prepare_instance(project)
    sampler = Sampler(NoEditor(), "cpu", settings, 32)
    with (
        patch.object(generate, "load_sampler", lambda plan, device: sampler),
        patch("diffusemix_pipeline.editing.cost.load_sampler", lambda plan, device: sampler),
        dg.DagsterInstance.get() as instance,
    ):
        run_id = materialize(project, settings, instance, ASSETS)
        steps = {step.step_key: step for step in instance.get_run_step_stats(run_id)}
    took = pd.Series({key: (s.end_time or 0) - (s.start_time or 0) for key, s in steps.items()})
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return {"peak_mb": peak, "by_asset": took.round(1).to_dict()}


def materialize(
    project: Project, settings: Settings, instance: "dg.DagsterInstance", assets: Sequence[str]
) -> str:
    """Materialize some assets in this process, without a word; return the run's id."""
    import dagster as dg

    from diffusemix_pipeline.orchestration.build import build_definitions
    from diffusemix_pipeline.progress import silent

    definitions = build_definitions(project, settings, lambda log: silent)
    done = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(name) for name in assets],
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )
    return done.run_id


def compare_workers(
    count: int, size: int, *, first_alone: bool
) -> dict[str, dict[str, list[float]]]:
    """Return by stage, for each of three pairs, two workers' speed over that of two copies.

    Beside it the seconds of the workers, and of a copy, by the mean of both speeds.
    """
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        write_source(here / "source", count, size)
        found: dict[str, dict[str, list[float]]] = {}
        for turn in range(_PAIRS):
            os.sync()  # or one turn waits for the disk to take what an earlier one wrote
            how: dict[str, Any] = {"size": size, "first_alone": first_alone}
            copies = [_start_alone(here, f"{turn}-{core}", {core}, **how) for core in (0, 1)]
            alone = [_told(copy) for copy in copies]
            os.sync()
            both = _told(_start_alone(here, f"{turn}-both", {0, 1}, **how))
            for stage, seconds in both.items():
                of_copies = harmonic_mean([copy[stage] for copy in alone])
                measured = {
                    "ratio": of_copies / (2 * seconds),
                    "workers_s": seconds,
                    "copies_s": of_copies,
                }
                for name, number in measured.items():
                    found.setdefault(stage, {}).setdefault(name, []).append(round(number, 3))
        return found


def _start_alone(
    here: Path, name: str, cores: set[int], *, size: int, first_alone: bool
) -> subprocess.Popen[str]:
    """Start a process that makes the stages into a folder of its own, on some cores alone."""
    within = ["--within", str(here / name), "--source", str(here / "source"), "--size", str(size)]
    within += ["--first-stage"] if first_alone else []
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.scale", "--workers", *within],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def _told(process: subprocess.Popen[str]) -> dict[str, float]:
    told, _ = process.communicate()
    assert process.returncode == 0
    return dict(json.loads(told.splitlines()[-1]))


def time_stages(folder: Path, source: Path, size: int, *, first_alone: bool) -> dict[str, float]:
    """Ingest, edit (for nothing, untimed) and mix; return the seconds of each stage, or one."""
    from diffusemix_pipeline.datasets.ingest import ingest
    from diffusemix_pipeline.editing import generate
    from diffusemix_pipeline.editing.sampling import Sampler
    from diffusemix_pipeline.editing.store import EditStore
    from diffusemix_pipeline.mixing.fractals import load_fractals
    from diffusemix_pipeline.mixing.stages import make_augmented, make_hybrids
    from diffusemix_pipeline.progress import silent

    settings = load_settings(folder, overrides=[f"size={size}"], environment={})
    aside, fractals = folder / "aside", folder.parent / "fractals"
    load_fractals(settings.mixing, settings.seed, size, fractals, silent)  # the first makes them
    sampler = Sampler(NoEditor(), "cpu", settings, 32)
    seconds = {}
    began = time.monotonic()
    raw = ingest(str(source), settings, folder / "raw", aside=aside)
    seconds["raw"] = time.monotonic() - began
    if first_alone:
        return seconds
    with patch.object(generate, "load_sampler", lambda plan, device: sampler):
        generated = generate.generate(
            raw,
            settings,
            folder / "generated",
            store=EditStore(folder / "edits"),
            aside=aside,
            device="cpu",
        ).stage
    began = time.monotonic()
    make_hybrids(raw, generated, settings, folder / "hybrid", aside=aside)
    seconds["hybrid"] = time.monotonic() - began
    began = time.monotonic()
    make_augmented(
        raw, generated, settings, folder / "augmented", fractal_cache=fractals, aside=aside
    )
    seconds["augmented"] = time.monotonic() - began
    return seconds


def _seconds(root: Path, command: Sequence[str], state: Path) -> float:
    """Time a DVC command; `state` is where it keeps what it knows of files."""
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "dvc", *command],
        cwd=root,
        env=os.environ | {"DVC_SITE_CACHE_DIR": str(state)},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.monotonic() - began


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", help="how many; 1000,10000,100000, and of workers 10000")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--workers", action="store_true", help="compare workers with copies")
    parser.add_argument("--first-stage", action="store_true", help="compare them there alone")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.within and options.workers:
        alone = options.first_stage
        found = time_stages(options.within, options.source, options.size, first_alone=alone)
        print(json.dumps(found))
        return
    if options.within:
        print(json.dumps(run_assets(Project(options.within), options.overrides)))
        return
    if options.workers:
        images, alone = int(options.images or 10_000), options.first_stage
        print(json.dumps(compare_workers(images, options.size, first_alone=alone)))
        return
    for count in (options.images or "1000,10000,100000").split(","):
        print(json.dumps(measure(int(count), options.size, options.overrides)), flush=True)


if __name__ == "__main__":
    main()
