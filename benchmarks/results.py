"""The published results: every arm of an experiment, three seeds, read on test once.

    python -m benchmarks.results EXPERIMENT --data DATASET --folder FOLDER [--seeds 0,1]
    python -m benchmarks.results EXPERIMENT --data DATASET --folder FOLDER --arms mixup --again
    python -m benchmarks.results

The first trains and asks what is not answered yet, hours on two cores, and goes on where it was
cut off. An experiment is a YAML file of settings in `benchmarks/results`. Answers are kept beside
it, each with the question that it answers, which follows from data, settings and code, not from
where it was computed, so that seeds can come from several machines. The second is for who doubts
them: it answers once more, into FOLDER alone, and sets the two side by side. The third makes all
tables anew from the answers, without a classifier: a report an experiment in `outputs/results`, and
what the arms come to on two of them together.
"""

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from benchmarks.fits import Task, ask_all, fit_all, make_stages, without_copies
from diffusemix_pipeline.datasets.manifest import Stage, class_names
from diffusemix_pipeline.devices import choose_device, is_fast_at_bfloat16
from diffusemix_pipeline.editing.editor import editor_fingerprint, locate_editor, locate_lora
from diffusemix_pipeline.editing.planning import CODE_VERSION as PLAN_VERSION
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.comparison import (
    WITH_EDITS,
    Comparison,
    by_arm,
    shared_families,
)
from diffusemix_pipeline.evaluation.evidence import CODE_VERSION as EVIDENCE_VERSION
from diffusemix_pipeline.evaluation.evidence import Evidence, asked_of
from diffusemix_pipeline.evaluation.readings import version_of_test
from diffusemix_pipeline.evaluation.report import ReportInputs, write_report
from diffusemix_pipeline.evaluation.report_text import in_points
from diffusemix_pipeline.evaluation.statistics import CONFIDENCE, Estimate, holm
from diffusemix_pipeline.evaluation.written_report import MARKDOWN, title_of
from diffusemix_pipeline.files import link_or_copy, write_bytes, write_json
from diffusemix_pipeline.identity import digest, file_sha256, seed_from
from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.mixing.fractals import fractals_version
from diffusemix_pipeline.mixing.stages import CODE_VERSION as MIX_VERSION
from diffusemix_pipeline.recipes import training_identity
from diffusemix_pipeline.settings import Arm, Settings
from diffusemix_pipeline.training.arms import BASELINE, SUBJECTS, Wanted, all_fits
from diffusemix_pipeline.training.arms import CODE_VERSION as FIT_VERSION
from diffusemix_pipeline.training.augmentations import VERSIONS

HOME = Path(__file__).with_suffix("")
TOGETHER = ("flowers12", "cifar10")
"""The experiments whose mean says which arm is best."""
IMAGES_TAKEN = {"cifar10": {"train": 590, "test": 200}}
"""Images a class; of 590, some 500 stay for training where val is split off."""
_NOTED = ("copies_across_splits", "set_aside")
_READING = ["question", "arm", "seed", "images", "steps", "val_accuracy", "processor", "bfloat16"]


def produce(
    name: str, data: Path, folder: Path, seeds: Sequence[int], arms: Sequence[str] | None
) -> None:
    """Answer what an experiment asks for, seed by seed, and keep it in `HOME`; `arms` None: all."""
    settings, raw = _experiment(name, data, folder)
    facts = {"counts": raw.counts, "test": version_of_test(raw), "raw": raw.version}
    write_json(HOME / name / "data.json", facts | {key: raw.notes[key] for key in _NOTED})
    readings = _readings(name)
    answered = set(_last_answers(readings)["question"])
    missing = [
        wanted
        for wanted in _chosen(settings, seeds, arms)
        if _question(wanted.arm, wanted.seed, raw.version, settings) not in answered
    ]
    tasks = _tasks(missing, raw, settings, folder)
    for seed in sorted({wanted.seed for wanted in missing}):
        of_seed = [task for task in tasks if task.wanted.seed == seed]
        fits = fit_all(of_seed)
        for fit, evidence in zip(fits, ask_all(of_seed), strict=True):
            evidence.save(_answers(name, fit.arm, seed))
            fit.curve.to_csv(_answers(name, fit.arm, seed) / "curve.csv", index=False)
            reading = {
                "arm": fit.arm,
                "seed": seed,
                "question": _question(fit.arm, seed, raw.version, settings),
                "images": fit.images,
                "steps": fit.steps,
                "val_accuracy": fit.best["val_accuracy"],
                "processor": torch.backends.cpu.get_cpu_capability(),
                "bfloat16": is_fast_at_bfloat16(choose_device("auto")),
            }
            row = pd.DataFrame([reading])
            # Joined to a table without rows, whole numbers would become fractions.
            readings = row if readings.empty else pd.concat([readings, row])
            write_bytes(HOME / name / "readings.csv", readings.to_csv(index=False).encode())


def reproduce(
    name: str, data: Path, folder: Path, seeds: Sequence[int], arms: Sequence[str] | None
) -> str:
    """Answer once more, into `folder` alone; return Markdown: what is published, and this."""
    settings, raw = _experiment(name, data, folder)
    if raw.version != _facts(name)["raw"]:
        raise UserError(
            f"{data} does not hold the images that {name} is published on: docs/results.md says "
            "which these are."
        )
    wanted = _chosen(settings, seeds, arms)
    published = [Evidence.load(_answers(name, fit.arm, fit.seed)) for fit in wanted]
    if not published:
        raise UserError(f"{name} has no such arm and seed: {HOME / name}.yaml names them.")
    tasks = _tasks(wanted, raw, settings, folder)
    fit_all(tasks)
    pairs = {
        (fit.arm, fit.seed): both
        for fit, *both in zip(wanted, published, ask_all(tasks), strict=True)
    }
    return _side_by_side(pairs, settings)


def _side_by_side(pairs: Mapping[tuple[Arm, int], Sequence[Evidence]], settings: Settings) -> str:
    """Return a table, in %: of each arm and seed, the published measures and those made again."""
    families = settings.evaluation.corruptions
    shown = shared_families(settings.training.arms, settings.editing.prompts, families)
    rows = []
    for (arm, seed), (published, again) in pairs.items():
        row = {"Arm": title_of(arm), "Seed": str(seed)}
        before, after = (_shares(one, shown["left_out"]) for one in (published, again))
        row |= {name: f"{share:.1f}, {after[name]:.1f}" for name, share in before.items()}
        classes = published.probabilities.argmax(1), again.probabilities.argmax(1)
        row["Same class"] = f"{100 * np.mean(classes[0] == classes[1]):.1f}"
        rows.append(row)
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _shares(evidence: Evidence, left_out: Sequence[str]) -> dict[str, float]:
    """Return the shares of answers that were right, in %."""
    unshared = [family not in left_out for family in evidence.corruptions]
    at_two = evidence.epsilons.index(2)
    shares = {
        "Clean": evidence.correct,
        "Corrupted": evidence.corrupted,
        "Corrupted, unshared": evidence.corrupted[unshared],
        "FGSM 2/255": evidence.fgsm[at_two],
    }
    return {name: 100 * float(right.mean()) for name, right in shares.items()}


def _experiment(name: str, data: Path, folder: Path) -> tuple[Settings, Stage]:
    """Return an experiment's settings, and its images, ingested into `folder`."""
    source = _taken(data, folder / "taken", IMAGES_TAKEN[name]) if name in IMAGES_TAKEN else data
    settings = _settings(name, [f"source.path={source.resolve()}"])
    return settings, without_copies(str(source), settings, folder)


def _chosen(settings: Settings, seeds: Sequence[int], arms: Sequence[str] | None) -> list[Wanted]:
    """Return the fits of an experiment that were asked for; `arms` None: of all of them."""
    return [
        wanted
        for wanted in all_fits(settings)
        if wanted.seed in seeds and (arms is None or wanted.arm in arms)
    ]


def _tasks(wanted: Sequence[Wanted], raw: Stage, settings: Settings, folder: Path) -> list[Task]:
    """Return a task a fit, with edits where one needs them."""
    stages = {"raw": raw}
    if any(fit.arm in WITH_EDITS for fit in wanted):
        stages = make_stages(raw, settings, folder, kept=folder)
    return [Task(fit, stages, settings, "test", folder) for fit in wanted]


def _settings(name: str, overrides: Sequence[str] = ()) -> Settings:
    return load_settings(HOME, config=HOME / f"{name}.yaml", overrides=overrides, environment={})


def _readings(name: str) -> pd.DataFrame:
    """Return a row each time that test images were read."""
    path = HOME / name / "readings.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=_READING)


def _last_answers(readings: pd.DataFrame) -> pd.DataFrame:
    """Return of each arm and seed the last reading, whose answers are kept."""
    return readings.drop_duplicates(["arm", "seed"], keep="last")


def _answers(name: str, arm: Arm, seed: int) -> Path:
    return HOME / name / f"{arm}-{seed}"


def _question(arm: Arm, seed: int, raw_version: str, settings: Settings) -> str:
    """Identify an answer by what is asked for.

    Not by the edits' bytes, which differ in their last bits from machine to machine, but by all
    that they follow from.
    """
    code = [FIT_VERSION, EVIDENCE_VERSION]
    recipe = training_identity(settings.training)
    asked = asked_of(settings.evaluation)
    made: list[Any] = [VERSIONS[arm]] if arm in VERSIONS else []
    if arm == "pixmix":
        made.append(fractals_version(settings.mixing, settings.seed))
    if arm in WITH_EDITS:
        editing = settings.editing
        editor = locate_editor(editing.editor, editing.revision)
        made += [editing.model_dump(), settings.mixing.model_dump()]
        made += [editor_fingerprint(editor, locate_lora(editing.lora)), PLAN_VERSION, MIX_VERSION]
        made.append(fractals_version(settings.mixing, settings.seed))
    return digest(code, arm, seed, settings.seed, settings.size, raw_version, recipe, asked, made)


def _taken(data: Path, folder: Path, most: Mapping[str, int]) -> Path:
    """Link some images a class of each split, drawn by their content, into `folder`, alone."""
    shutil.rmtree(folder, ignore_errors=True)
    for split, count in most.items():
        for of_class in sorted((data / split).iterdir()):
            drawn = sorted(of_class.iterdir(), key=file_sha256)[:count]
            for image in drawn:
                target = folder / split / of_class.name / image.name
                link_or_copy(image, target)
    return folder


def tables(out: Path) -> Iterator[str]:
    """Write an experiment's report into `out` and yield its Markdown; last, that of the mean."""
    comparisons, reads = {}, _reads_by_test()
    for name in sorted(path.stem for path in HOME.glob("*.yaml")):
        settings, facts, last = _settings(name), _facts(name), _last_answers(_readings(name))
        last = last[[_is_asked(row, facts, settings) for row in last.itertuples()]]
        if last.empty:
            continue
        seeds = set.intersection(*last.groupby("arm")["seed"].agg(set))  # that every arm has
        last = last[last["seed"].isin(seeds)]
        answered = set(last[["arm", "seed"]].itertuples(index=False, name=None))
        missing = [fit for fit in all_fits(settings) if (fit.arm, fit.seed) not in answered]
        if missing:
            yield f"**Left out of {name}, as not answered: {', '.join(map(str, missing))}.**\n"
        evidence = {
            (arm, seed): Evidence.load(_answers(name, arm, seed))
            for arm, seed in last[["arm", "seed"]].itertuples(index=False, name=None)
        }
        inputs = ReportInputs(
            evidence=evidence,
            classes=class_names(facts["counts"]),
            settings=settings,
            counts=facts["counts"]["by_split"],
            curves={key: pd.read_csv(_answers(name, *key) / "curve.csv") for key in evidence},
            steps=dict(zip(last["arm"], last["steps"].tolist(), strict=True)),
            few_images={},
            test_reads=reads[facts["test"]],
            versions={"test": facts["test"]},
            copies=facts["copies_across_splits"],
            set_aside=facts["set_aside"],
        )
        report = write_report(inputs, out / name, aside=out)
        more = _more_measures(json.loads(report.json.read_text("utf-8")))
        yield f"## {name}\n\n{(report.folder / MARKDOWN).read_text('utf-8')}\n{more}"
        arms = by_arm(evidence)
        if name in TOGETHER and set(arms) == set(settings.training.arms):
            families = next(iter(evidence.values())).corruptions
            left_out = shared_families(list(arms), settings.editing.prompts, families)["left_out"]
            drawn = settings.evaluation.bootstrap_samples, seed_from(settings.seed, "bootstrap")
            comparisons[name] = list(arms), Comparison(arms, left_out, *drawn)
    if len(comparisons) == len(TOGETHER):
        yield f"## On the mean of {' and '.join(TOGETHER)}\n\n{_together(comparisons)}"


def _more_measures(document: Mapping[str, Any]) -> str:
    """Return as Markdown the measures of each arm that the report's first page leaves out."""
    at = f"{document['attacks']['epsilon']:g}/255"
    shares = {
        "overall": "Mean of clean and unshared",
        "mce_to_vanilla": "mCE, normalised by vanilla",
        "mce_to_vanilla_unshared": "The same, unshared",
        "pgd": f"PGD-20, {at}",
        "autoattack": f"AutoAttack, {at}",
        "seed_deviation": "SD over seeds",
    }
    losses = {"brier": "Brier", "nll": "NLL"}

    def shown(number: Any) -> str:
        if number is None:
            return ""
        return f"{100 * (number['value'] if isinstance(number, dict) else number):.1f}"

    rows = [
        [title_of(arm["arm"])]
        + [shown(arm[name]) for name in shares]
        + [f"{arm[name]['value']:.3f}" for name in losses]
        for arm in document["arms"]
    ]
    table = pd.DataFrame(rows, columns=["Arm", *shares.values(), *losses.values()])
    return table.to_markdown(index=False, disable_numparse=True) + "\n"


def _is_asked(reading: Any, facts: Mapping[str, Any], settings: Settings) -> bool:
    """Say whether a reading, a row of the table, answers what the settings ask for today."""
    asked = _question(reading.arm, reading.seed, facts["raw"], settings)
    return bool(reading.question == asked)


def _reads_by_test() -> Counter[str]:
    """Count the readings of each version of test images, which experiments share."""
    reads: Counter[str] = Counter()
    for facts in HOME.glob("*/data.json"):
        name = facts.parent.name
        reads[_facts(name)["test"]] += len(_readings(name))
    return reads


def _facts(name: str) -> dict[str, Any]:
    """Return what an experiment's data are."""
    path = HOME / name / "data.json"
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def _together(comparisons: Mapping[str, tuple[list[Arm], Comparison]]) -> str:
    """Return a table of every arm's difference to each of DiffuseMix's arms, overall.

    The experiments share nothing, so the variance of the mean is the mean of theirs over their
    number; a variance is taken from an interval's length as if it were a normal one's.
    """
    each = list(comparisons.values())
    arms = [arm for arm in each[0][0] if arm != BASELINE]
    columns: dict[str, dict[str, str]] = {}
    for subject in SUBJECTS:
        found = {
            arm: _mean([c.differences(arm, subject, ["overall"])["overall"] for _, c in each])
            for arm in (BASELINE, *arms)
            if arm != subject
        }
        adjusted = holm({arm: estimate.p for arm, estimate in found.items()})
        columns[f"less {title_of(subject)}"] = {
            title_of(arm): f"{in_points(e.value)} ({in_points(e.low)} to {in_points(e.high)}), "
            f"p {max(adjusted[arm], 0.001):.3f}{' or less' * (adjusted[arm] <= 0.001)}"
            for arm, e in found.items()
        }
    table = pd.DataFrame(columns).fillna("")
    table.index.name = "Arm"
    return table.to_markdown(disable_numparse=True) + "\n"


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    reach = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    errors = [(estimate.high - estimate.low) / (2 * reach) for estimate in estimates]
    value = float(np.mean([estimate.value for estimate in estimates]))
    error = float(np.linalg.norm(errors)) / len(estimates)
    p = float(2 * stats.norm.sf(abs(value) / error))
    return Estimate(value, value - reach * error, value + reach * error, p)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    names = sorted(path.stem for path in HOME.glob("*.yaml"))
    parser.add_argument("experiment", nargs="?", choices=names, help="none: make the tables anew")
    parser.add_argument("--data", type=Path, help="a folder with train/ and test/")
    parser.add_argument("--folder", type=Path, help="where everything is kept")
    parser.add_argument("--seeds", default="0,1,2", help="which of them")
    parser.add_argument("--arms", help="which of them; all")
    parser.add_argument("--again", action="store_true", help="answer once more, and compare")
    options = parser.parse_args()
    if options.experiment:
        if not options.data or not options.folder:
            parser.error("an experiment needs --data and --folder")
        chosen = [int(seed) for seed in options.seeds.split(",")]
        arms = options.arms.split(",") if options.arms else None
        asked = options.experiment, options.data, options.folder, chosen, arms
        try:
            if options.again:
                print(reproduce(*asked))
            else:
                produce(*asked)
        except UserError as error:
            parser.error(str(error))
    else:
        for text in tables(Path("outputs/results")):
            print(text)
