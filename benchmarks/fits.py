"""Classifiers for the benchmarks: fitted and asked in several processes, a core each.

Two fits on a core each are 1.4 times as fast as one after the other on both. Whatever is finished
stays in the folder, so a run that was cut off goes on.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from diffusemix_pipeline.datasets.dropped import Dropped
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.manifest import Stage, class_names
from diffusemix_pipeline.devices import choose_device, usable_cores
from diffusemix_pipeline.editing.generate import generate
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.evaluation.evidence import CODE_VERSION as EVIDENCE_VERSION
from diffusemix_pipeline.evaluation.evidence import Evidence, ask_and_keep, asked_of
from diffusemix_pipeline.identity import digest
from diffusemix_pipeline.mixing.stages import make_augmented, make_hybrids
from diffusemix_pipeline.settings import Settings
from diffusemix_pipeline.terminal import progress_bars
from diffusemix_pipeline.training.arms import Fit, Wanted, fit_arm, fit_fingerprint
from diffusemix_pipeline.training.classifier import load_classifier
from diffusemix_pipeline.training.data import load_images
from diffusemix_pipeline.training.fold_teachers import label_gate

Item = TypeVar("Item")


@dataclass(frozen=True)
class Task:
    """A fit that is wanted, what it is made from, and the split that it is asked about."""

    wanted: Wanted
    stages: Mapping[str, Stage]
    settings: Settings
    split: str
    folder: Path
    """Where checkpoints and answers are kept."""

    @property
    def answers(self) -> Path:
        """The folder of the answers: by the fit, the images and all that is asked."""
        fit = fit_fingerprint(self.wanted, self.stages, self.settings)
        asked = asked_of(self.settings.evaluation)
        images = self.stages["raw"].version
        name = digest(EVIDENCE_VERSION, fit, images, self.split, asked)
        return self.folder / "answers" / name


def without_copies(source: str, settings: Settings, folder: Path) -> Stage:
    """Ingest a source without the pictures of train and val that lie in a later split, too."""
    aside = folder / "aside"
    whole = ingest(source, settings, folder / "whole", aside=aside)
    copies = {copy["image"] for copy in whole.notes["copies_across_splits"]}
    rows = whole.manifest()
    rows = rows[rows["source_id"].isin(copies)]
    places = rows["split"] + "/" + rows["label"]
    dropped = Dropped(frozenset(zip(rows["source_sha256"], places, strict=True)))
    return ingest(source, settings, folder / "raw", aside=aside, dropped=dropped)


def make_stages(raw: Stage, settings: Settings, folder: Path, *, kept: Path) -> dict[str, Stage]:
    """Edit and mix the training images of `raw` into `folder`; return all four stages by name.

    What others may use too (edits, the gate's teachers, fractals) lies in `kept`.
    """
    aside, device = kept / "aside", choose_device("auto")
    with progress_bars() as progress:
        generated = generate(
            raw,
            settings,
            folder / "generated",
            store=EditStore(kept / "edits"),
            aside=aside,
            device=device,
            gate_of=lambda plan: label_gate(
                plan, raw, folder=kept / "gate", aside=aside, device=device, progress=progress
            ),
            progress=progress,
        ).stage
        hybrid = make_hybrids(
            raw, generated, settings, folder / "hybrid", aside=aside, progress=progress
        )
        augmented = make_augmented(
            raw,
            generated,
            settings,
            folder / "augmented",
            fractal_cache=kept / "fractals",
            aside=aside,
            progress=progress,
        )
    return {"raw": raw, "generated": generated, "hybrid": hybrid, "augmented": augmented}


def fit_all(tasks: Sequence[Task]) -> list[Fit]:
    """Fit each task's classifier, or take what was fitted before; in the order of the tasks."""
    with _processes() as pool:
        return list(_told("fitted", pool.map(_fit, tasks), len(tasks)))


def ask_all(tasks: Sequence[Task]) -> list[Evidence]:
    """Return what the tasks' fitted classifiers answer, asking those that were not asked.

    Those of a group of tasks see the same corrupted images, which are made once a group.
    """
    unasked = [task for task in tasks if not task.answers.exists()]
    groups = [unasked[start :: _workers()] for start in range(min(_workers(), len(unasked)))]
    with _processes() as pool:
        list(_told("groups asked", pool.map(_ask, groups), len(groups)))
    return [Evidence.load(task.answers) for task in tasks]


def _workers() -> int:
    return usable_cores() if choose_device("auto") == "cpu" else 1


@contextmanager
def _processes() -> Iterator[ProcessPoolExecutor]:
    threads = 1 if _workers() > 1 else torch.get_num_threads()
    with ProcessPoolExecutor(
        _workers(), get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        yield pool


def _told(what: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    began = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        took = time.monotonic() - began
        left = took / done * (total - done)
        print(f"{done} of {total} {what}, {took / 60:.0f} min, {left / 60:.0f} left", flush=True)


def _fit(task: Task) -> Fit:
    return fit_arm(
        task.wanted,
        task.stages,
        task.settings,
        checkpoints=task.folder / "checkpoints",
        fractal_cache=task.folder / "fractals",
        aside=task.folder / "aside",
        device=choose_device("auto"),
        on_point=lambda step, point: None,
    )


def _ask(tasks: Sequence[Task]) -> None:
    """Ask tasks that share images and questions."""
    device, first = choose_device("auto"), tasks[0]
    aside, settings, raw = first.folder / "aside", first.settings, first.stages["raw"]
    images = load_images([raw], first.split, class_names(raw.counts), settings.size, aside=aside)
    kept = {task.answers.name: task.answers for task in tasks}  # choices share arms and seeds
    ask_and_keep(
        {task.answers.name: load_classifier(_fit(task).folder, device).model for task in tasks},
        kept,
        images,
        settings.evaluation,
        settings.seed,
        device,
        aside=aside,
    )
