"""What fewer UNet evaluations cost in quality: accuracy against evaluations.

`python -m benchmarks.curve FOLDER [--images DATASET]` edits, mixes, trains and judges under every
schedule, with the bundled editor on its teachers' prompts, and writes `curve.csv` and `curve.png`
into the folder. It goes on where it was cut off: edits, classifiers and answers stay in the folder.
The images are digits, or those of a dataset with `train/` and `test/`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from benchmarks.fits import Task, ask_all, fit_all, make_stages
from diffusemix_pipeline.bundled_editor.evaluation import (
    measure_edits,
    psnr_to_teacher,
    train_prompt_judge,
    train_subject_judge,
)
from diffusemix_pipeline.bundled_editor.sources import read_digits, read_image_folder
from diffusemix_pipeline.bundled_editor.teachers import PROMPTS
from diffusemix_pipeline.datasets.images import read_square
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.devices import choose_device
from diffusemix_pipeline.editing.editor import load_editor, locate_editor
from diffusemix_pipeline.editing.generate import generate
from diffusemix_pipeline.editing.planning import plan_edits
from diffusemix_pipeline.editing.sampling import Sampler, workers_on
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.evaluation.evidence import Evidence
from diffusemix_pipeline.evaluation.statistics import mean_estimates
from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.pictures import LIGHT
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.settings import Arm, Settings
from diffusemix_pipeline.training.arms import Wanted
from diffusemix_pipeline.training.classifier import to_tensor

PAPER = "euler_ancestral, 100 steps, guided 1"
BEST = "dpmsolver++, 100 steps, guided 1"
GUIDED: dict[int, list[tuple[float, float]]] = {
    100: [(0, 1), (0, 0.5)],
    50: [(0, 1), (0, 0.5)],
    20: [(0, 1), (0, 0.5), (0, 0.2)],
    10: [(0, 1), (0, 0.5), (0, 0.2)],
    8: [(0.125, 0.875)],  # all but the first step and the last
    5: [(0, 1), (0, 0.4), (0.2, 0.6), (0, 0.2)],
}
"""The parts of the steps that are guided, by the number of steps."""
MARKERS = {"1": "o", "0.5": "s", "0.4": "D", "0.2": "^", "between": "P"}
"""By the last word of what a schedule's name says of its guidance."""
SEEDS = (0, 1, 2)
TURNS = 3
JUDGED_IMAGES = 10
JUDGE_STEPS = 1500


@dataclass(frozen=True)
class Bench:
    """Where everything is kept, what computes, and which images."""

    folder: Path
    device: str
    images: Path | None
    """A dataset with train/ and test/; None for digits."""

    def settings(self, overrides: Sequence[str]) -> Settings:
        """Return the demo's settings but for these."""
        own = ["editing.copies=1", "editing.gate.enabled=false", "mixing.fractal_count=32"]
        own += ["evaluation.fgsm_epsilons=[2]", "evaluation.attack_images=0"]
        own += ["evaluation.autoattack_images=0"]
        if self.images:
            own += [f"source.path={self.images}", "source.val_fraction=0.2"]
            own += ["source.train_per_class=30", "training.flip=true"]
        return load_settings(
            Path("/nonexistent"), preset="demo", overrides=[*own, *overrides], environment={}
        )

    def pictures(self, split: str) -> tuple[np.ndarray, list[str]]:
        """Return uint8 (N, 32, 32, 3) images of a split that is no part of it, and their names."""
        if self.images:
            return read_image_folder(self.images / split, 32)
        return read_digits(32, split)


def schedules() -> dict[str, list[str]]:
    """Return the settings of each schedule by its name, dearest first; the paper's is the first."""
    named = {PAPER: ["editing.sampler=euler_ancestral", "editing.steps=100"]}
    for steps in GUIDED:
        for since, until in GUIDED[steps]:
            part = f"{until:g}" if since == 0 else "between"
            named[f"dpmsolver++, {steps} steps, guided {part}"] = [
                f"editing.steps={steps}",
                f"editing.guidance_from={since}",
                f"editing.guidance_until={until}",
            ]
    return named


def measure(bench: Bench) -> pd.DataFrame:
    """Measure every schedule and write table and plot; return the table, a row a schedule.

    Columns: UNet evaluations an edit; share of edits whose prompt is named; PSNR in dB to the
    nearest of 16 draws of the teacher, with the 95 % intervals (over images) of its difference to
    that of 100 steps, by the same sampler and by the paper's; images/s, timed by turns at the end;
    mean absolute difference to the 100-step edit in 1/255; accuracies of classifiers trained on
    originals and augmented images (mean over three seeds, the same steps), with their paired
    differences to the paper's schedule and 95 % intervals.
    """
    judged = _judged_images(bench)
    prompt_judge, subject_judge, classes = _judges(bench)
    rows, edits, answers = [], {}, {}
    psnr: dict[str, np.ndarray] = {}
    for name, overrides in {"originals alone": None, **schedules()}.items():
        settings = bench.settings(overrides or [])
        answers[name] = _answers(bench, settings, augmented=overrides is not None)
        if overrides is None:
            continue
        edits[name] = _edits_of(bench, judged, settings)
        originals, labels = _pixels(judged, classes)
        figures = measure_edits(originals, labels, edits[name], prompt_judge, subject_judge, seed=0)
        psnrs = [
            psnr_to_teacher(originals, edits[name][number], prompt, 0).mean(0)
            for number, prompt in enumerate(PROMPTS)
        ]
        psnr[name] = torch.stack(psnrs).mean(0).numpy()
        rows.append(
            {
                "schedule": name,
                "unet_evaluations": settings.editing.unet_evaluations,
                "prompt_named": figures["named"],
                "psnr_to_teacher": float(psnr[name].mean()),
                "subject": figures["subject"],
            }
        )
        print(rows[-1], flush=True)
    for row in rows:
        for other, column in ((BEST, "100_steps"), (PAPER, "paper")):
            low, high = _interval(psnr[row["schedule"]] - psnr[other])
            row |= {f"psnr_less_{column}_low": low, f"psnr_less_{column}_high": high}
        row["difference_to_100_steps_255"] = float(
            255 * (edits[row["schedule"]] - edits[BEST]).abs().mean()
        )
    table = pd.DataFrame(rows).set_index("schedule")
    table["images_per_second"] = _images_per_second(bench, judged)
    table = table.join(_downstream(answers), how="outer")
    table = table.loc[["originals alone", *schedules()]]
    table.to_csv(bench.folder / "curve.csv")
    plot(table).savefig(bench.folder / "curve.png", dpi=120)
    return table


def plot(table: pd.DataFrame) -> Figure:
    """Draw fidelity and downstream accuracy against UNet evaluations, in the reports' palette."""
    panels = {
        "psnr_to_teacher": "PSNR to the teacher, dB",
        "difference_to_100_steps_255": "Difference to the 100-step edit, 1/255",
        "clean": "Accuracy, clean",
        "corrupted": "Accuracy, corrupted",
    }
    colours = dict(zip(MARKERS, LIGHT.series[1:], strict=False))
    figure = Figure(figsize=(11, 7), layout="constrained", facecolor=LIGHT.paper)
    drawn = table.dropna(subset=["unet_evaluations"])
    for axes, (column, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for part, marker in MARKERS.items():
            some = drawn[drawn.index.str.fullmatch(f"dpm.*guided {part}")]
            axes.plot(
                some["unet_evaluations"], some[column], marker, ms=8, color=colours[part],
                label=f"guided {part}",
            )  # fmt: skip
        paper = drawn.loc[PAPER]
        axes.plot(
            paper["unet_evaluations"], paper[column], "*", ms=14, color=LIGHT.ink,
            label="the paper's",
        )  # fmt: skip
        if column in ("clean", "corrupted"):
            alone = table.loc["originals alone", column]
            axes.axhline(alone, ls=":", color=LIGHT.muted, label="originals alone")
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        axes.set(xscale="log", xlabel="UNet evaluations an edit", title=title)
        axes.set_xticks([10, 30, 100, 300])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=LIGHT.grid)
        axes.set_axisbelow(True)
    axes.legend()
    return figure


# Edits ------------------------------------------------------------------------------------------


def _judged_images(bench: Bench) -> Stage:
    """Return a stage of some images on which the judges were not trained."""
    pixels, names = bench.pictures("test")
    few = np.linspace(0, len(pixels) - 1, JUDGED_IMAGES).astype(int)
    for number in few:
        path = bench.folder / "judged" / names[number] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(path)
    settings = bench.settings(["source.train_per_class=null"])
    source, aside = str(bench.folder / "judged"), bench.folder / "aside"
    return ingest(source, settings, bench.folder / "judged-raw", aside=aside, train_only=True)


def _pixels(stage: Stage, classes: np.ndarray) -> tuple[Tensor, Tensor]:
    rows = stage.manifest()
    images = np.stack([read_square(stage.folder / name, 32) for name in rows["file_name"]])
    return to_tensor(images), torch.tensor(classes.searchsorted(rows["label"]))


def _interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of paired differences (N,), by bootstrap."""
    found = stats.bootstrap((differences,), np.mean, method="percentile", rng=0)
    return found.confidence_interval.low, found.confidence_interval.high


def _edits_of(bench: Bench, judged: Stage, settings: Settings) -> Tensor:
    """Return float32 [prompts, 2 seeds, N, 3, 32, 32]: every prompt's edits of the judged."""
    every = settings.editing.model_copy(update={"prompts_per_image": "all", "copies": 2})
    settings = settings.model_copy(update={"editing": every})
    stage = _generated(bench, judged, "judged-generated", settings)
    files = stage.manifest().set_index(["prompt", "copy", "source_id"])["file_name"]
    sources = judged.manifest()["image_id"]
    pixels = [
        read_square(stage.folder / files[prompt, copy, source], 32)
        for prompt in PROMPTS
        for copy in (0, 1)
        for source in sources
    ]
    return to_tensor(np.stack(pixels)).unflatten(0, (len(PROMPTS), 2, len(sources)))


def _images_per_second(bench: Bench, judged: Stage) -> pd.Series:
    """Time one batch for each worker under every schedule, by turns; return the medians."""
    speeds: dict[str, list[float]] = {name: [] for name in schedules()}
    weights = locate_editor("bundled", None)
    for _ in range(TURNS):
        for name, overrides in schedules().items():
            settings = bench.settings([*overrides, "editing.prompts_per_image=all"])
            batch = settings.editing.batch_size
            edits = list(islice(plan_edits(judged, settings), batch * workers_on(bench.device)))
            editor = load_editor(weights, settings.editing, bench.device)
            with tempfile.TemporaryDirectory(dir=bench.folder) as scratch:
                started = time.perf_counter()
                store = EditStore(Path(scratch))
                sampler = Sampler(editor, bench.device, settings, batch)
                sampler.make(edits, len(edits), store, silent)
                speeds[name].append(len(edits) / (time.perf_counter() - started))
    return pd.Series({name: median(each) for name, each in speeds.items()})


def _generated(bench: Bench, raw: Stage, name: str, settings: Settings) -> Stage:
    store, aside = EditStore(bench.folder / "edits"), bench.folder / "aside"
    out = bench.folder / name
    return generate(raw, settings, out, store=store, aside=aside, device=bench.device).stage


def _judges(bench: Bench) -> tuple[nn.Module, nn.Module, np.ndarray]:
    """Train judges of prompt and subject; return the names of the subjects too."""
    pixels, names = bench.pictures("train")
    images = to_tensor(pixels)
    classes = np.unique(names)
    labels = torch.tensor(classes.searchsorted(names))
    prompt = train_prompt_judge([images], JUDGE_STEPS, 0)
    return prompt, train_subject_judge(images, labels, JUDGE_STEPS, 0), classes


# Classifiers ------------------------------------------------------------------------------------


def _answers(bench: Bench, settings: Settings, *, augmented: bool) -> list[Evidence]:
    """Return what classifiers of three seeds answer on the test images, asking what is not kept."""
    folder = bench.folder
    raw = ingest(settings.source.path, settings, folder / "raw", aside=folder / "aside")
    stages = make_stages(raw, settings, folder, kept=folder) if augmented else {"raw": raw}
    arm: Arm = "diffusemix" if augmented else "vanilla"
    tasks = [Task(Wanted(arm, seed), stages, settings, "test", folder) for seed in SEEDS]
    fit_all(tasks)
    return ask_all(tasks)


def _downstream(answers: Mapping[str, list[Evidence]]) -> pd.DataFrame:
    """Return each schedule's accuracies, and how far they lie from the paper's schedule's."""
    kinds: dict[str, Callable[[Evidence], np.ndarray]] = {
        "clean": lambda evidence: evidence.correct,
        "corrupted": lambda evidence: evidence.corrupted.mean(axis=(0, 1)),
        "fgsm": lambda evidence: evidence.fgsm[0],
    }
    rows = {}
    for name, of_seeds in answers.items():
        row = {}
        for kind, score in kinds.items():
            own, paper = (
                np.mean([score(evidence) for evidence in each], axis=0)
                for each in (of_seeds, answers[PAPER])
            )
            row[kind] = own.mean()
            difference = mean_estimates({0: own - paper}, 2000, 0, kind="difference")[0]
            row |= {f"{kind}_low": difference.low, f"{kind}_high": difference.high}
        rows[name] = row
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--images", type=Path, help="a dataset with train/ and test/")
    options = parser.parse_args()
    print(measure(Bench(options.folder, choose_device("auto"), options.images)).to_string())
