"""What orchestration alone costs as shards and runs add up: an editor that sleeps, real Dagster.

    python -m benchmarks.simulation [--runs 15] [--shards 200]

Each run of `raw_dataset` and `generated_images` finds about two new images a shard, some of them
not for training, and each edit sleeps for 10 ms. Prints a line a run: its seconds, as many a shard,
how many of these lie in its step (the sleep among them), the events that the run wrote, and the
size of Dagster's databases after it. Everything lies in a temporary folder.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dagster as dg
import numpy as np

from benchmarks.mixing import NoEditor
from benchmarks.scale import materialize, write_source
from diffusemix_pipeline.editing import generate
from diffusemix_pipeline.editing.sampling import Sampler
from diffusemix_pipeline.layers import SETTINGS_FILE, load_settings
from diffusemix_pipeline.orchestration.launch import prepare_instance
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

ASSETS = ("raw_dataset", "generated_images")
_EDIT_SECONDS = 0.01
_NEW_IMAGES = 2  # a shard
_SIZE = 16


class SleepingEditor(NoEditor):
    """Stands where a device works, and takes time that costs no core."""

    def edit(
        self, images: np.ndarray, instructions: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray:
        time.sleep(_EDIT_SECONDS * len(images))
        return super().edit(images, instructions, seeds)


def simulate(here: Path, runs: int, shards: int) -> Iterator[dict[str, Any]]:
    """Materialize over and over, with new images each time; tell of each run."""
    project, count = Project(here / "project"), 0
    project.root.mkdir()
    given = {
        "size": _SIZE,
        "source": {"path": str(here / "source")},
        "editing": {"shards": shards, "batch_size": 1},
    }
    (project.root / SETTINGS_FILE).write_text(json.dumps(given), encoding="utf-8")
    settings = load_settings(project.root, environment={})
    prepare_instance(project)
    with chdir(project.root), dg.DagsterInstance.get() as instance:
        for _ in range(runs):
            more = count + shards * _NEW_IMAGES
            write_source(here / "source", more, _SIZE, start=count)
            count = more
            began = time.monotonic()
            with _sleeping(settings):
                run_id = materialize(project, settings, instance, ASSETS)
            seconds = time.monotonic() - began
            steps = instance.get_run_step_stats(run_id)
            took = [
                (step.end_time or 0) - (step.start_time or 0)
                for step in steps
                if "edit_shard" in step.step_key
            ]
            assert len(took) == shards
            databases = (project.state / "dagster").rglob("*.db*")
            yield {
                "images": count,
                "seconds": round(seconds, 1),
                "seconds_a_shard": round(seconds / shards, 3),
                "of_that_in_its_step": round(sum(took) / shards, 3),
                "events": len(instance.all_logs(run_id)),
                "databases_mb": round(sum(path.stat().st_size for path in databases) / 1e6, 1),
            }


@contextmanager
def _sleeping(settings: Settings) -> Iterator[None]:
    sampler = Sampler(SleepingEditor(), "cpu", settings, 1)
    with (
        patch.object(generate, "load_sampler", lambda plan, device: sampler),
        patch("diffusemix_pipeline.editing.cost.run_pilot", lambda *arguments, **options: None),
    ):
        yield


def main() -> None:
    """Read the command line, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--shards", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for told in simulate(Path(folder), options.runs, options.shards):
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
