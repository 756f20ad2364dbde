"""What each choice of DiffuseMix is worth, judged on val alone: the test images are not read.

    python -m benchmarks.ablation FOLDER --config SETTINGS.yaml --data DATASET [--choices A;B]
        [--seeds 0,1] [--set KEY=VALUE]

Trains classifiers of the settings' seeds under each choice (mixing online, copies an image,
prompts, the gate, the order of the two joins, lambda), asks them about the val images, clean and
under the settings' corruptions, and writes `ablation.csv` into the folder. It goes on where it was
cut off: edits, classifiers and answers stay in the folder.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.fits import Task, ask_all, fit_all, make_stages, without_copies
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.evaluation.comparison import WITH_EDITS, shared_families
from diffusemix_pipeline.evaluation.statistics import difference_spread, mean_estimates
from diffusemix_pipeline.identity import digest
from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.mixing.blending import hybrid, mix
from diffusemix_pipeline.mixing.fractals import fractals_version
from diffusemix_pipeline.mixing.masks import Mask
from diffusemix_pipeline.mixing.stages import Fractals, Mixer, fractals_in_a_file, write_mixed
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.settings import Arm, Settings
from diffusemix_pipeline.training.arms import Wanted

WEATHER = "[autumn, snowy, sunset, rainbow, aurora]"
ART = '[watercolor art, mosaic, ukiyo-e, "a sketch with crayon"]'
BASE = "diffusemix"


@dataclass(frozen=True)
class Choice:
    """An arm under some settings."""

    arm: Arm = "diffusemix"
    overrides: tuple[str, ...] = ()
    fractal_first: bool = False
    """Blend the fractal into the edit alone, and join the original's half to it afterwards."""


CHOICES = {
    "vanilla": Choice("vanilla"),
    "augmix": Choice("augmix"),
    "pixmix": Choice("pixmix"),
    BASE: Choice(),
    "online": Choice("diffusemix_online"),
    "2 copies": Choice(overrides=("editing.copies=2",)),
    "4 copies": Choice(overrides=("editing.copies=4",)),
    "online, 4 copies": Choice("diffusemix_online", ("editing.copies=4",)),
    "prompts: weather and light": Choice(overrides=(f"editing.prompts={WEATHER}",)),
    "prompts: art": Choice(overrides=(f"editing.prompts={ART}",)),
    "gate": Choice(overrides=("editing.gate.enabled=true",)),
    "fractal first, in the edit's half": Choice(fractal_first=True),
    "lambda 0": Choice(overrides=("mixing.lam=0",)),
    "lambda 0.4": Choice(overrides=("mixing.lam=0.4",)),
    "online, lambda 0.4": Choice("diffusemix_online", ("mixing.lam=0.4",)),
    "online, lambda 0.6": Choice("diffusemix_online", ("mixing.lam=0.6",)),
    "online, lambda 0.4, prompts: art": Choice(
        "diffusemix_online", ("mixing.lam=0.4", f"editing.prompts={ART}")
    ),
}


@dataclass(frozen=True)
class Bench:
    """Where everything is kept, which images, and under which settings."""

    folder: Path
    data: str
    config: Path
    seeds: str = ""
    """Some of the settings' seeds, by ','; all where it is empty."""
    overrides: tuple[str, ...] = ()
    """Of the settings, for every choice."""

    @property
    def aside(self) -> Path:
        return self.folder / "aside"

    def settings(self, overrides: Sequence[str] = ()) -> Settings:
        own = [f"source.path={self.data}", "evaluation.attack_images=0"]
        own += ["evaluation.autoattack_images=0", *self.overrides, *overrides]
        own += [f"training.seeds=[{self.seeds}]"] if self.seeds else []
        return load_settings(self.folder, config=self.config, overrides=own, environment={})


def measure(bench: Bench, names: Sequence[str]) -> pd.DataFrame:
    """Train and ask under every choice; return accuracies and paired differences to the base.

    Columns, shares of 1, means over seeds: `clean`; `corrupted`, over all families; `unshared`,
    over those that no arm here shows a classifier in training; each with the 95 % interval of its
    difference to DiffuseMix as it is.
    """
    tasks = {name: _tasks(bench, CHOICES[name], list(CHOICES).index(name)) for name in names}
    every = [task for of_choice in tasks.values() for task in of_choice]
    fit_all(every)
    found = iter(ask_all(every))
    answers = {name: [next(found) for _ in of_choice] for name, of_choice in tasks.items()}
    settings = bench.settings()
    families = settings.evaluation.corruptions
    shared = _shared(bench, names, families)
    unshared = [place for place, family in enumerate(families) if family not in shared]
    kinds = {
        "clean": [[e.correct.astype(float) for e in each] for each in answers.values()],
        "corrupted": [[e.corrupted.mean(axis=(0, 1)) for e in each] for each in answers.values()],
        "unshared": [
            [e.corrupted[unshared].mean(axis=(0, 1)) for e in each] for each in answers.values()
        ],
    }
    table = pd.DataFrame(index=pd.Index(names, name="choice"))
    for kind, scores in kinds.items():
        stacked = np.array(scores)  # (choices, seeds, images)
        means = stacked.mean(axis=1)
        changes = {
            name: means[place] - means[names.index(BASE)] for place, name in enumerate(names)
        }
        spread = difference_spread(stacked)
        estimated = mean_estimates(
            changes,
            settings.evaluation.bootstrap_samples,
            settings.seed,
            kind="difference",
            spreads=dict.fromkeys(names, spread),
        )
        table[kind] = means.mean(axis=1)
        for end in ("low", "high"):
            table[f"{kind}_{end}"] = [getattr(estimated[name], end) for name in names]
        table.loc[BASE, [f"{kind}_low", f"{kind}_high"]] = 0.0  # it does not differ from itself
    table.to_csv(bench.folder / "ablation.csv")
    return table


def _shared(bench: Bench, names: Sequence[str], families: Sequence[str]) -> list[str]:
    """Return the families of corruption that a classifier is shown under some of the choices."""
    choices = [CHOICES[name] for name in names]
    arms = sorted({choice.arm for choice in choices})
    edited = [choice for choice in choices if choice.arm in WITH_EDITS]
    asked = [bench.settings(choice.overrides).editing.prompts for choice in edited]
    prompts = sorted({prompt for of_choice in asked for prompt in of_choice})
    left_out: list[str] = shared_families(arms, prompts, families)["left_out"]
    return left_out


def _tasks(bench: Bench, choice: Choice, place: int) -> list[Task]:
    """Return a choice's fits, a seed each, with the stages that they need."""
    settings = bench.settings(choice.overrides)
    raw = without_copies(bench.data, settings, bench.folder)
    stages = _stages(bench, choice, raw, settings, bench.folder / f"choice-{place:02d}")
    return [
        Task(Wanted(choice.arm, seed), stages, settings, "val", bench.folder)
        for seed in settings.training.seeds
    ]


def _stages(
    bench: Bench, choice: Choice, raw: Stage, settings: Settings, folder: Path
) -> Mapping[str, Stage]:
    if choice.arm not in WITH_EDITS:
        return {"raw": raw}
    stages = make_stages(raw, settings, folder, kept=bench.folder)
    if choice.fractal_first:
        out = folder / "fractal-first"
        stages["augmented"] = _fractal_first(bench, raw, stages["generated"], settings, out)
    return stages


def _fractal_first(
    bench: Bench, raw: Stage, generated: Stage, settings: Settings, out: Path
) -> Stage:
    """Write M I + (1 - M) ((1 - lam) G + lam F): the original's half stays as it is."""
    seed = settings.seed
    drawn = [seed, settings.mixing.model_dump(), fractals_version(settings.mixing, seed)]
    fingerprint = digest("fractal first", raw.version, generated.version, *drawn)
    with fractals_in_a_file(settings, bench.folder / "fractals", bench.aside, silent) as fractals:
        join = _FractalFirst(fractals, seed, settings.mixing.lam)
        mixer = Mixer(raw.folder, generated.folder, settings, join)
        return write_mixed(
            "augmented", fingerprint, drawn, mixer, raw, generated, out, bench.aside, silent
        )


@dataclass(frozen=True)
class _FractalFirst:
    fractals: Fractals
    seed: int
    lam: float

    def __call__(
        self, original: np.ndarray, edit: np.ndarray, mask: Mask, edit_key: str
    ) -> tuple[np.ndarray, dict[str, Any]]:
        name, fractal = self.fractals.draw(self.seed, edit_key)
        blended = mix(edit, edit, mask, fractal, self.lam)
        return hybrid(original, blended, mask), {"fractal_id": name, "lam": self.lam}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file of settings")
    parser.add_argument("--data", required=True, help="a folder of labelled images")
    parser.add_argument("--choices", default=";".join(CHOICES), help="some of them, by ';'")
    parser.add_argument("--seeds", default="", help="some of the settings' seeds, by ','")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    chosen = options.choices.split(";")
    if unknown := set(chosen) - CHOICES.keys():
        parser.error(f"no such choice: {sorted(unknown)[0]}")
    if BASE not in chosen:
        parser.error(f"--choices needs {BASE}, which the others are compared with")
    overrides = tuple(options.overrides)
    bench = Bench(options.folder, options.data, options.config, options.seeds, overrides)
    pd.set_option("display.width", 200)
    print(measure(bench, chosen).round(3).to_string())
