"""Which edits a dataset wants: prompt, copy and seed of each, and the key that identifies it.

What belongs here: what follows from rows, settings and the editor's weights. To know these by their
bytes, `plan_edits` finds the editor, and downloads it where it is not here. What does not: making
edits. Pixels are read only where somebody asks a `SourceImage` for them.
"""

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.columns import mapped, rows_digest, tuples
from diffusemix_pipeline.datasets.dropped import NOTHING, Dropped
from diffusemix_pipeline.datasets.manifest import (
    PartFacts,
    Stage,
    class_names,
    layout_of,
    whole_stage,
)
from diffusemix_pipeline.datasets.storage import Layout, StoredFiles
from diffusemix_pipeline.editing.editor import editor_fingerprint, locate_editor, locate_lora
from diffusemix_pipeline.files import Ledger
from diffusemix_pipeline.identity import digest, draw, seed_from
from diffusemix_pipeline.recipes import training_identity
from diffusemix_pipeline.settings import PLACE_OR_SPEED, Editing, Settings

CODE_VERSION = "2"
PARTS = "planned"
"""The note in which a stage keeps its plan's `part_fingerprints`."""
GATE_VERSION = "2"
"""Of the label gate: new where its teachers or its rules would judge otherwise."""


class SourceImage(NamedTuple):
    """A training image that is to be edited; `sha256` is that of the bytes in `data/raw`."""

    image_id: str
    label: str
    files: StoredFiles
    file_name: str
    sha256: str
    source_sha256: str

    def content(self) -> bytes:
        """Return the bytes of its file."""
        return self.files.read(self.file_name)

    def read(self, size: int) -> np.ndarray:
        """Return its pixels as uint8 (size, size, 3)."""
        return self.files.pixels(self.file_name, size)


def case(key: str, label: str) -> str:
    """Name what a gate judges: the same edit may be wanted under two labels."""
    return f"{key} {label}"


@dataclass(frozen=True, slots=True)
class PlannedEdit:
    """One wanted edit: `key` identifies its bytes."""

    key: str
    source: SourceImage
    prompt: str
    instruction: str
    copy: int
    attempt: int
    seed: int

    @property
    def case(self) -> str:
        """What a gate judges."""
        return case(self.key, self.source.label)


@dataclass(frozen=True)
class Plan:
    """The edits that a stage wants, and what they follow from.

    Iterating gives the first attempts in the order of their sources' names, dropped ones too. Each
    is made when it is asked for: what one holds of them costs some 700 bytes, their rows here a
    fifth of that.
    """

    shape: str
    """Identifies all that the stage follows from beside the sources."""
    editor: Path
    weights: str
    """The editor's fingerprint."""
    settings: Settings
    gate: str | None
    """Identifies the label gate whose verdicts count; None where it is off."""
    dropped: frozenset[str]
    """Keys of edits that a person took out: they are neither made nor used."""
    layout: Layout
    """Of the stage."""
    classes: list[str]
    _files: StoredFiles
    _sources: pd.DataFrame
    """The training images that are edited, with the columns of `SourceImage` but for the files."""

    def __len__(self) -> int:
        """Count the first attempts, dropped ones too: to tell these, each would have to be made."""
        editing = self.settings.editing
        prompts = len(editing.prompts) if editing.prompts_per_image == "all" else 1
        return len(self._sources) * editing.copies * prompts

    def __iter__(self) -> Iterator[PlannedEdit]:
        return self.edits_of(self._sources)

    def edits_of(self, sources: pd.DataFrame) -> Iterator[PlannedEdit]:
        """Give the first attempts of some of the sources."""
        settings = self.settings
        for image_id, label, *rest in tuples(sources):
            source = SourceImage(image_id, sys.intern(label), self._files, *rest)
            for copy in range(settings.editing.copies):
                for prompt in _prompts(source.sha256, copy, settings):
                    yield _planned(source, prompt, copy, 0, settings, self.weights)

    def shard(self, number: int, of: int) -> "Shard":
        """Return the edits that fall to shard `number` (from 0) of `of`, but for dropped ones.

        It follows from the bytes of an edit's source, so that no other shard makes the same one.
        """
        falls_to = mapped(self._sources["sha256"], lambda sha256: int(sha256[:16], 16) % of)
        return Shard(self, self._sources[falls_to == number])

    @cached_property
    def fingerprint(self) -> str:
        """Identify the stage."""
        return digest("generated", self.shape, self.part_fingerprints)

    @cached_property
    def part_fingerprints(self) -> dict[str, str]:
        """Identify what each part of the stage follows from."""
        return {
            str(name): digest(self.shape, name, *(sources[of].tolist() for of in sources))
            for name, sources in self._sources.groupby(self._part_names)
        }

    def by_part(self) -> Iterator[tuple[str, "Plan"]]:
        """Give the parts of the stage by name, each as a plan of its sources alone."""
        for name, sources in self._sources.groupby(self._part_names):
            yield str(name), replace(self, _sources=sources)

    def parts_in(self, folder: Path) -> dict[str, PartFacts | None]:
        """Return the parts that a stage folder holds as this plan wants them, and what is known.

        That is nothing of a part whose edits were all dropped. With a label gate, there are none:
        its verdicts follow from all training images.
        """
        stage = None if self.gate else whole_stage(folder, self.layout)
        if stage is None:
            return {}
        noted = stage.notes.get(PARTS, {})
        return {
            name: stage.parts.get(name)
            for name, of in self.part_fingerprints.items()
            if noted.get(name) == of
        }

    def without_parts(self, names: Collection[str]) -> "Plan":
        """Return the plan of all other parts than these."""
        return replace(self, _sources=self._sources[~self._part_names.isin(names)])

    @cached_property
    def _part_names(self) -> pd.Series:
        return mapped(
            self._sources["image_id"], lambda source: self.layout.part_of("train", source)
        )

    def verdicts(self, folder: Path) -> Ledger:
        """Return where the gate keeps its verdicts, below the folder of all gates."""
        return Ledger(folder / "verdicts" / str(self.gate))

    def next_attempt(self, edit: PlannedEdit) -> PlannedEdit:
        """Return the same edit from another seed."""
        attempt = edit.attempt + 1
        return _planned(edit.source, edit.prompt, edit.copy, attempt, self.settings, self.weights)


@dataclass(frozen=True)
class Shard:
    """Some of a plan's edits."""

    plan: Plan
    sources: pd.DataFrame

    def __iter__(self) -> Iterator[PlannedEdit]:
        edits = self.plan.edits_of(self.sources)
        return (edit for edit in edits if edit.key not in self.plan.dropped)


def plan_edits(raw: Stage, settings: Settings, dropped: Dropped = NOTHING) -> Plan:
    """List the edits that the training images of `raw` want."""
    editing = settings.editing
    folder = locate_editor(editing.editor, editing.revision)
    weights = editor_fingerprint(folder, locate_lora(editing.lora))
    # The editor is known by the bytes of its weights, its LoRA's among them.
    shape = editing.model_dump(exclude={*PLACE_OR_SPEED, "gate"})
    columns = ["image_id", "label", "file_name", "sha256", "source_sha256"]
    train = raw.manifest([*columns, "split"]).query("split == 'train'")[columns]
    gate = _gate_version(raw, train, settings)
    gated = [gate, editing.gate.max_attempts] if gate else None
    left_out = sorted(dropped.edits)
    layout, classes = layout_of(raw, settings.storage), class_names(raw.counts)
    labels = classes if layout.packed else None  # their places are in the shards
    asked = [settings.seed, settings.size, shape, weights, gated, left_out, labels]
    sources = _share(train, editing.share, settings.seed)
    return Plan(
        shape=digest(CODE_VERSION, *asked),
        editor=folder,
        weights=weights,
        settings=settings,
        gate=gate,
        dropped=dropped.edits,
        layout=layout,
        classes=classes,
        _files=raw.files,
        _sources=sources,
    )


def _share(sources: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """Keep a share of each class, rounded up: the images with the lowest hashes.

    A larger share holds every image of a smaller one, so nothing that was paid for is lost.
    """
    if share == 1:
        return sources
    hashes = mapped(sources["sha256"], lambda sha256: seed_from(seed, "share", sha256))
    place = hashes.groupby(sources["label"]).rank(method="first")  # from 1
    of_class = sources.groupby("label")["label"].transform("size")
    return sources[place <= np.ceil((share * of_class).round(6))]  # 0.07 * 100 is above 7


def _prompts(source_sha256: str, copy: int, settings: Settings) -> Sequence[str]:
    prompts = settings.editing.prompts
    if settings.editing.prompts_per_image == "all":
        return prompts
    return [draw(prompts, settings.seed, "prompt", source_sha256, copy)]


def instruction(prompt: str, editing: Editing) -> str:
    """Return what the editor is told, one string for all edits."""
    return sys.intern(editing.template.format(prompt=prompt))


def _planned(
    source: SourceImage, prompt: str, copy: int, attempt: int, settings: Settings, weights: str
) -> PlannedEdit:
    editing = settings.editing
    told = instruction(prompt, editing)
    seed = seed_from(settings.seed, "edit", source.sha256, prompt, copy, attempt)
    guided = editing.guided_steps
    scales = [editing.guidance, editing.image_guidance] if guided else None
    sampling = [editing.sampler, editing.steps, guided.start, guided.stop, scales]
    sides = [settings.size, edited_side(settings)]
    key = digest(source.sha256, told, weights, sides, sampling, seed)
    return PlannedEdit(key, source, prompt, told, copy, attempt, seed)


def _gate_version(raw: Stage, train: pd.DataFrame, settings: Settings) -> str | None:
    """Identify the gate by all that its teachers and its rules follow from.

    An image that was dropped counts as if it was there: it is not worth judging all edits anew.
    """
    gate = settings.editing.gate
    if not gate.enabled:
        return None
    dropped = [row for row in raw.notes.get("dropped", []) if row["split"] == "train"]
    there = train[["label", "sha256"]]
    gone = pd.DataFrame(dropped, columns=list(there)).astype(there.dtypes)
    seen = rows_digest(pd.concat([there, gone]))
    classes = class_names(raw.counts)
    rules = gate.model_dump(exclude={"max_attempts"})
    return digest("gate", teacher_recipe(settings), classes, seen, rules)


def teacher_recipe(settings: Settings) -> list[Any]:
    """Return what shapes every teacher of the gate beside the images that it sees."""
    recipe = training_identity(settings.training)
    del recipe["validations"]  # teachers have one, after the last step
    recipe.pop("processes", None)  # each is trained by one
    return [GATE_VERSION, settings.size, settings.seed, recipe]


def edited_side(settings: Settings) -> int:
    """Return the side in px at which images are edited; edits are kept at `size` px."""
    return max(settings.size, settings.editing.min_side)
