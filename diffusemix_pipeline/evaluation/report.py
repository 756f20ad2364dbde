"""The report: evidence of every arm becomes a page, a JSON document and plots.

What belongs here: what is said and shown, and the files. What does not: computing evidence, the
numbers (comparison), drawing (pictures). The report is a function of its inputs: it holds no date,
host or run id, so the same evidence gives the same bytes. `docs/report.md` explains every number.
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from diffusemix_pipeline import pictures
from diffusemix_pipeline.datasets.manifest import without_images
from diffusemix_pipeline.editing.editor import BUNDLED
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.attacks import autoattack_attacks
from diffusemix_pipeline.evaluation.audit import Audit
from diffusemix_pipeline.evaluation.comparison import (
    WITH_EDITS,
    Comparison,
    arm_documents,
    by_arm,
    class_documents,
    confusion_document,
    few_images_document,
    in_order,
    reliability_document,
    rival_documents,
    rounded,
    shared_families,
)
from diffusemix_pipeline.evaluation.evidence import Evidence
from diffusemix_pipeline.evaluation.published_corruptions import counted
from diffusemix_pipeline.evaluation.statistics import uneven_seeds
from diffusemix_pipeline.files import replaced_folder, undamaged, write_bytes, write_json
from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.settings import Arm, Settings
from diffusemix_pipeline.training.arms import BASELINE, SUBJECTS, slug

DOCUMENT = "report.json"
PAGE = "index.html"
MARKDOWN = "report.md"
SCHEMA_VERSION = 7
CODE_VERSION = "10"
_NAMED = 5  # classes, in a sentence
MEASURES = ("clean", "corrupted", "fgsm", "ece")

_CLASSES_SHOWN = 30
_ARMS_DRAWN = 6  # as lines: more cannot be told apart
_NEAR_ZERO = 0.1  # accuracy: one survivor of sixteen tells no more than none
_TITLES = {
    "vanilla": "Vanilla",
    "trivialaugment": "TrivialAugment",
    "randaugment": "RandAugment",
    "mixup": "Mixup",
    "cutmix": "CutMix",
    "augmix": "AugMix",
    "pixmix": "PixMix",
    "generated_only": "Generated only",
    "hybrid_only": "Hybrid only",
    "diffusemix": "DiffuseMix",
    "diffusemix_online": "DiffuseMix online",
    "diffusemix+cutmix": "DiffuseMix + CutMix",
}


@dataclass(frozen=True, eq=False)
class ReportInputs:
    """Everything that a report says."""

    evidence: Mapping[tuple[Arm, int], Evidence]
    """(arm, training seed) -> evidence; all on the same test images, with the same settings."""
    classes: Sequence[str]
    """Class names by label."""
    settings: Settings
    counts: Mapping[str, Mapping[str, int]]
    """Split -> class -> images."""
    curves: Mapping[tuple[Arm, int], pd.DataFrame]
    """(arm, training seed) -> columns step, train_loss, val_accuracy."""
    steps: Mapping[str, int]
    """Arm -> optimiser steps."""
    few_images: Mapping[tuple[Arm, int, int], Evidence]
    """(arm, training images a class, training seed) -> answers on the clean test images."""
    test_reads: int
    """How often this version of the test images was read on this machine, with these."""
    versions: Mapping[str, str]
    """What finds the inputs again, e.g. the digest in data.dvc and the version of the code."""
    copies: Sequence[Mapping[str, str]] = ()
    """Pictures of train or val that a held-out split has too: `split`, `image`, `held_out`."""
    set_aside: Sequence[Mapping[str, str]] = ()
    """Source images that were not used: `source_id` and `reason`."""
    audit: Audit | None = None
    """The surest wrong answers of the subject's first seed, and what may have led to them."""
    stages: bytes | None = None
    """A PNG of example images: original, edit, hybrid, augmented; None: none are to be shown."""


@dataclass(frozen=True, eq=False)
class Report:
    """What a written report says and where it lies."""

    headline: str
    """One sentence: what DiffuseMix did to clean, corrupted and FGSM accuracy, against vanilla, and
    which rivals it fell behind."""
    summary: pd.DataFrame
    """A row an arm. For each of `MEASURES` m (0 to 1), and for corrupted_unshared where families
    are left out, the columns m, m_low, m_high, and, against vanilla and NaN in its own row,
    m_difference, m_difference_low, m_difference_high."""
    versions: Mapping[str, str]
    """What was judged: see `ReportInputs.versions`."""
    fgsm_epsilon: float
    """The FGSM strength of the summary, in units of 1/255."""
    left_out: tuple[str, ...]
    """The families of corruption that some arm was shown in training."""
    folder: Path
    html: Path
    json: Path
    plots: tuple[Path, ...]


def write_report(inputs: ReportInputs, out: Path, *, aside: Path) -> Report:
    """Write `index.html`, `report.md`, `report.json` and plots as PNG files into the folder `out`.

    The folder is replaced as a whole. `aside` lies on the same file system, outside of anything
    versioned. Raises UserError where the evidence is empty or not all on the same test images and
    settings.
    """
    _check(inputs.evidence)
    document = _document(inputs)
    light = _plots(inputs, document, pictures.LIGHT)
    dark = _plots(inputs, document, pictures.DARK)
    page = _page(document, light, dark, inputs)
    with replaced_folder(out, mark=DOCUMENT, aside=aside) as folder:
        write_bytes(folder / PAGE, page.encode("utf-8", "replace"))
        write_bytes(folder / MARKDOWN, _markdown(document).encode())
        write_json(folder / DOCUMENT, document)
        files = {name: plot.png for name, plot in light.items()}
        if inputs.stages is not None:
            files["stages"] = inputs.stages
        if inputs.audit and inputs.audit.sheet is not None:
            files["audit"] = inputs.audit.sheet
        for name, png in files.items():
            write_bytes(folder / f"{name}.png", png)
    return read_report(out)


def read_report(folder: Path) -> Report:
    """Return what a written report says; UserError where there is none, or a damaged one."""
    path = folder / DOCUMENT
    if not path.exists():
        raise UserError(f"There is no report in {folder} yet: `diffusemix run` makes one.")
    with undamaged(path, "`diffusemix run` makes it anew."):
        document = json.loads(path.read_text(encoding="utf-8"))
        return Report(
            headline=document["headline"],
            summary=_summary(document),
            versions=document["versions"],
            fgsm_epsilon=document["fgsm_epsilon"],
            left_out=tuple(document["shared_families"]["left_out"]),
            folder=folder,
            html=folder / PAGE,
            json=path,
            plots=tuple(sorted(folder.glob("*.png"))),
        )


def _check(evidence: Mapping[tuple[Arm, int], Evidence]) -> None:
    if not evidence:
        raise UserError("There is nothing to report: no arm was evaluated.")
    (first_key, first), *others = evidence.items()
    for key, other in others:
        for axis in (
            "ids", "epsilons", "corruptions", "severities", "attack_epsilon", "attacked",
            "published_sets",
        ):  # fmt: skip
            if not np.array_equal(getattr(other, axis), getattr(first, axis)):
                raise UserError(
                    f"The evidence of {key[0]}, seed {key[1]}, has other {axis} than that of "
                    f"{first_key[0]}, seed {first_key[1]}: evaluate both again."
                )


# The document: what report.json holds, and the page shows


def _document(inputs: ReportInputs) -> dict[str, Any]:
    arms = by_arm(inputs.evidence)
    first = next(iter(inputs.evidence.values()))
    settings, evaluation = inputs.settings, inputs.settings.evaluation
    shared = shared_families(list(arms), settings.editing.prompts, first.corruptions)
    seed = seed_from(settings.seed, "bootstrap")
    drawn = (evaluation.bootstrap_samples, seed)
    comparison = Comparison(arms, shared["left_out"], *drawn)
    subject = next((arm for arm in SUBJECTS if arm in arms), None)
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "test_images": len(first.ids),
        "training_seeds": sorted({seed for _, seed in inputs.evidence}),
        "fgsm_epsilon": comparison.epsilon,
        "attacks": {
            "epsilon": first.attack_epsilon,
            "pgd_images": len(first.pgd),
            "autoattack_images": len(first.autoattack),
            "autoattack": list(autoattack_attacks(len(inputs.classes))),
        },
        "bootstrap_samples": evaluation.bootstrap_samples,
        "shared_families": shared,
        "published_sets": list(first.published_sets),
        "arms": [
            {
                **document_of_arm,
                "training_seeds": list(arms[document_of_arm["arm"]]),
                "steps": inputs.steps[document_of_arm["arm"]],
                "reliability": reliability_document(arms[document_of_arm["arm"]]),
                "classes": class_documents(arms[document_of_arm["arm"]], inputs.classes),
            }
            for document_of_arm in arm_documents(comparison, arms)
        ],
        "rivals": rival_documents(comparison, list(arms)),
        "confusion": confusion_document(arms[subject], arms[BASELINE], inputs.classes)
        if subject and BASELINE in arms
        else None,
        "few_images": few_images_document(inputs.few_images, arms, inputs.counts["train"], *drawn),
        "audit": [_rounded_case(case) for case in inputs.audit.cases] if inputs.audit else [],
        "data": {
            "classes": list(inputs.classes),
            "counts": {split: dict(of_class) for split, of_class in inputs.counts.items()},
            "copies_across_splits": [dict(copy) for copy in inputs.copies],
            "set_aside": [dict(image) for image in inputs.set_aside],
            "test_reads": inputs.test_reads,
        },
        "settings": settings.model_dump(mode="json", exclude={"tracking"}),
        "versions": dict(inputs.versions),
    }
    document["headline"] = _headline(document)
    document["notes"] = _notes(document)
    return document


def _rounded_case(case: Mapping[str, Any]) -> dict[str, Any]:
    nearest = [{**near, "similarity": rounded(near["similarity"])} for near in case["nearest"]]
    return {**case, "confidence": rounded(case["confidence"]), "nearest": nearest}


def _measures(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the titles of `MEASURES`, and of `corrupted_unshared` where that is not all."""
    titles = {
        "clean": "Clean",
        "corrupted": "Corrupted",
        "corrupted_unshared": "Corrupted, unshared",
        "fgsm": f"FGSM {_epsilon(document['fgsm_epsilon'])}",
        "ece": "Calibration error",
    }
    return {name: title for name, title in titles.items() if document["arms"][0][name]}


def _summary(document: Mapping[str, Any]) -> pd.DataFrame:
    rows = []
    for arm in document["arms"]:
        row = {"arm": arm["arm"]}
        for measure in _measures(document):
            against = (arm["difference"] or {}).get(measure, {})
            for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high")):
                row[f"{measure}{suffix}"] = arm[measure][end]
                row[f"{measure}_difference{suffix}"] = against.get(end, np.nan)
        rows.append(row)
    return pd.DataFrame(rows).set_index("arm")


# The words


def _headline(document: Mapping[str, Any]) -> str:
    compared = [arm for arm in document["arms"] if arm["difference"]]
    images = f"{document['test_images']:,} test images"
    seeds = len(document["training_seeds"])
    trained = f"{seeds} training seeds"
    if seeds == 1:
        trained = "one training seed (another may say otherwise)"
    if not compared:
        arms = ", ".join(
            f"{title_of(arm['arm'])} {_percent(arm['clean']['value'])} clean, "
            f"{_percent(arm['corrupted']['value'])} corrupted and "
            f"{_percent(arm['fgsm']['value'])} FGSM accuracy"
            for arm in document["arms"]
        )
        return f"There is no comparison, as vanilla or all but it is missing; on {images}: {arms}."
    subjects = [arm for arm in compared if arm["arm"] in SUBJECTS] or compared[-1:]
    found = "; ".join(_against_vanilla(document, subject) for subject in subjects)
    return (
        f"Against vanilla, on {images} and {trained}, {found}; "
        "in brackets, the difference and its 95 % interval."
    )


def _against_vanilla(document: Mapping[str, Any], subject: Mapping[str, Any]) -> str:
    """Say what an arm did to each accuracy, and which rivals it fell behind."""
    names = {
        "clean": "clean accuracy",
        **_corruption(document),
        "fgsm": f"FGSM accuracy at {_epsilon(document['fgsm_epsilon'])}",
    }
    difference = subject["difference"]
    first, second, third = (
        f"{_verb(difference[measure])} {name} ({_change(difference[measure])})"
        for measure, name in names.items()
    )
    title, behind = title_of(subject["arm"]), _beaten_by(document, subject["arm"])
    return f"{title} {first}, {second} and {third}{behind}"


def _corruption(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the measure of accuracy under corruption that arms are compared by, and its name."""
    if "corrupted_unshared" in _measures(document):
        return {"corrupted_unshared": "accuracy under unshared corruption"}
    return {"corrupted": "accuracy under corruption"}


def _beaten_by(document: Mapping[str, Any], subject: str) -> str:
    """Say which rivals are better than the subject by which accuracy, and the best of them by what.

    The others' differences are in the table of rivals.
    """
    names = {"clean": "clean accuracy", **_corruption(document), "overall": "the mean of both"}
    rivals = [rival for rival in document["rivals"] if rival["subject"] == subject]
    behind = []
    for measure, name in names.items():
        better = [r for r in rivals if r[measure]["significant"] and r[measure]["value"] > 0]
        better.sort(key=lambda rival: -rival[measure]["value"])
        if better:
            best, *others = (title_of(rival["arm"]) for rival in better)
            named = [f"{best} ({_change(better[0][measure])})", *others]
            behind.append(f"{_listed(named)} in {name}")
    return f", but fell behind {', '.join(behind)}" if behind else ""


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _verb(difference: Mapping[str, Any]) -> str:
    if not difference["significant"]:
        return "made no significant difference to"
    return "improved" if difference["value"] > 0 else "hurt"


def _change(difference: Mapping[str, Any]) -> str:
    value, low, high = map(in_points, _triple(difference))
    return f"{value} points, {low} to {high}"


def _notes(document: Mapping[str, Any]) -> list[str]:
    notes = [
        _seeds_note(document["training_seeds"]),
        _uneven_seeds_note(document["arms"], len(document["training_seeds"])),
        _reads_note(document["data"]["test_reads"]),
        _steps_note({arm["arm"]: arm["steps"] for arm in document["arms"]}),
        _copies_note(document["data"]["copies_across_splits"]),
        _untested_note(document["data"]["counts"]),
        _holm_note(document["arms"]),
        _masking_note(document),
        _attacks_note(document["attacks"]),
        _shared_note(document),
        _few_note(document),
        _editor_note(document),
        _thumbnails_note(document["settings"]),
        "The corruptions' families are ImageNet-C's, but their constants are this project's own: "
        "these numbers cannot be compared with a published mCE.",
        "The calibration error of a finite sample errs upwards, as it cannot be below zero, and "
        "the more so the less sure a classifier is. Its intervals are wide for that reason, and no "
        "arm is called better or worse by it.",
    ]
    return [note for note in notes if note]


def _seeds_note(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return (
            "Intervals cover the sampling of test images only, not what another training run would "
            f"do: every arm was trained with one seed ({seeds[0]}). Where seeds matter, a "
            "difference that is called significant may be one of seeds: train with at least three."
        )
    return (
        f"Numbers are means over {len(seeds)} training seeds. Intervals cover the sampling of test "
        "images and of training seeds; those of the calibration error cover test images only."
    )


def _uneven_seeds_note(arms: Sequence[Mapping[str, Any]], seeds: int) -> str:
    """Name the arms whose seeds lie apart as the one variance of all arms does not allow for."""
    deviations = {
        arm["arm"]: arm["seed_deviation"] for arm in arms if arm["seed_deviation"] is not None
    }
    uneven = [
        f"{title_of(arm)} (a standard deviation of {100 * deviations[arm]:.1f} points, the others' "
        f"{100 * others:.1f})"
        for arm, others in uneven_seeds(deviations, seeds).items()
    ]
    if not uneven:
        return ""
    return (
        f"The training seeds of {_listed(uneven)} lie further apart, in the mean of clean accuracy "
        "and accuracy under corruption, than chance explains. Intervals take the variance between "
        "seeds to be the same for all arms, so where these arms are compared they may be too "
        "narrow: more seeds tell."
    )


def _holm_note(arms: Sequence[Mapping[str, Any]]) -> str:
    compared = sum(arm["difference"] is not None for arm in arms)
    words = (
        "Each interval is for one number. Of many numbers with 95 % intervals, about one in twenty "
        "lies outside its own by chance."
    )
    if compared > 1:
        words += (
            f" What is called better or worse is so after Holm's correction for {compared} arms, "
            "so an interval that leaves zero out may still be no significant difference."
        )
    return words


def _masking_note(document: Mapping[str, Any]) -> str:
    """Warn where FGSM accuracy rose and the strongest attack taken leaves next to nothing."""
    attacks = document["attacks"]
    strongest = "autoattack" if attacks["autoattack_images"] else "pgd"
    name = {"autoattack": "AutoAttack", "pgd": "PGD-20"}[strongest]
    fallen = [
        arm
        for arm in document["arms"]
        if arm["difference"] and arm[strongest] and arm[strongest]["value"] < _NEAR_ZERO
    ]
    risen = [
        (point["epsilon"], title_of(arm["arm"]))
        for arm in fallen
        for point in arm["fgsm_by_epsilon"]
        if _verdict(point["difference"]) == 1
    ]
    left = f"under {name} at {_epsilon(attacks['epsilon'])} next to nothing is left"
    words = []
    at_the_same = [arm for epsilon, arm in risen if epsilon == attacks["epsilon"]]
    if at_the_same:
        words.append(
            f"FGSM accuracy at {_epsilon(attacks['epsilon'])} rose for {_listed(at_the_same)}, "
            f"while {left}: this is not adversarial robustness. A real attacker takes more than "
            "one step."
        )
    if elsewhere := [(epsilon, arm) for epsilon, arm in risen if arm not in at_the_same]:
        strengths = [_epsilon(epsilon) for epsilon in sorted({epsilon for epsilon, _ in elsewhere})]
        arms = list(dict.fromkeys(arm for _, arm in elsewhere))
        words.append(
            f"FGSM accuracy at {_listed(strengths)} rose for {_listed(arms)}, "
            f"where no stronger attack was tried; {left}. This shows no adversarial robustness."
        )
    return f"WARNING: {' '.join(words)}" if words else ""


def _editor_note(document: Mapping[str, Any]) -> str:
    with_edits = any(arm["arm"] in WITH_EDITS for arm in document["arms"])
    if not with_edits or document["settings"]["editing"]["editor"] != BUNDLED:
        return ""
    return (
        "The bundled editor has learnt from pictures, without their labels: scikit-learn's digits, "
        "training images of CIFAR-10 and of twelve species of flowers. Where images are of these, "
        "arms with edits draw on more pictures than the others have seen, some test images of the "
        "digits among them: with images of your own, an advantage may be smaller."
    )


def _attacks_note(attacks: Mapping[str, Any]) -> str:
    words = (
        "FGSM is one step of a weak attack: accuracy under it is no measure of robustness against "
        "an attacker, and can rise only because gradients became less useful."
    )
    taken = []
    if attacks["pgd_images"]:
        taken.append(f"PGD-20 was tried on {attacks['pgd_images']:,} test images")
    if attacks["autoattack_images"]:
        names = ", ".join(attacks["autoattack"])
        taken.append(f"AutoAttack ({names}) on {attacks['autoattack_images']:,}")
    if taken:
        words += (
            f" {' and '.join(taken)}, drawn from the seed and the same for all arms, at "
            f"{_epsilon(attacks['epsilon'])}."
        )
    return words


def _few_note(document: Mapping[str, Any]) -> str:
    if not document["few_images"] or not document["settings"]["editing"]["gate"]["enabled"]:
        return ""
    return (
        "With fewer training images, DiffuseMix's edits are still those that the label gate let "
        "through, whose classifiers saw all training images: that favours it."
    )


def _shared_note(document: Mapping[str, Any]) -> str:
    shared = document["shared_families"]
    unknown = shared["unknown_prompts"]
    not_known = f" What these prompts show is not known: {', '.join(unknown)}." if unknown else ""
    if arms := [title_of(arm) for arm in shared["unknown_arms"]]:
        not_known += f" What these arms are shown in training is not known: {', '.join(arms)}."
    if not shared["left_out"]:
        return not_known.strip()
    by_whom = [
        f"{title_of(arm)}: {', '.join(map(_spoken, families))}"
        for arm, families in shared["arms"].items()
    ] + [
        f"{prompt} edits: {', '.join(map(_spoken, families))}"
        for prompt, families in shared["prompts"].items()
    ]
    words = (
        "Some arms are shown corruptions in training: "
        f"{', '.join(map(_spoken, shared['left_out']))} ({'; '.join(by_whom)}). "
        + (
            "Unshared numbers leave these families out, for all arms."
            if document["arms"][0]["corrupted_unshared"]
            else "No other family was asked for, so no number can leave them out."
        )
    )
    return words + not_known


def _reads_note(reads: int) -> str:
    times = "once" if reads == 1 else f"{reads:,} times"
    return (
        f"This version of the test images has been read {times} on this machine, a model a time, "
        "these included. The more often it is read, the less a choice made by it means."
    )


def _steps_note(steps: Mapping[str, int]) -> str:
    if len(set(steps.values())) == 1:
        return f"Every arm took the same {next(iter(steps.values())):,} optimiser steps."
    each = ", ".join(f"{title_of(arm)} {count:,}" for arm, count in steps.items())
    return (
        f"The arms took different numbers of optimiser steps, which is no fair comparison: {each}."
    )


def _copies_note(copies: Sequence[Any]) -> str:
    looked_for = "(near-copies counted; crops and mirrored pictures are not looked for)"
    if not copies:
        return f"No picture lies in two splits {looked_for}."
    lie = "picture lies" if len(copies) == 1 else "pictures lie"
    return (
        f"{len(copies):,} {lie} in two splits {looked_for}: "
        "accuracy on such pictures says nothing about new images."
    )


def _untested_note(counts: Mapping[str, Mapping[str, int]]) -> str:
    untested = without_images(counts, "test")
    if not untested:
        return ""
    others = untested[_NAMED:]
    names = [*untested[:_NAMED], *([f"{len(others):,} more"] if others else [])]
    return f"No test image shows {_listed(names)}: this report says nothing of that."


def _thumbnails_note(settings: Mapping[str, Any]) -> str:
    if settings["thumbnails"]:
        return ""
    return (
        "No picture of an image is shown, here, in MLflow or on the assets' pages: thumbnails is "
        "false. Names of files and classes are."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def in_points(share: float) -> str:
    """Return a difference of two shares in points, signed."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _epsilon(strength: float) -> str:
    return f"{strength:g}/255"


def title_of(arm: str) -> str:
    """Return an arm's name for people."""
    return _TITLES.get(arm) or Path(arm).stem


def _markdown(document: Mapping[str, Any]) -> str:
    """Return the report for a pull request: the headline, a table, and what it does not show."""
    measures = _measures(document)
    rows = [
        [title_of(arm["arm"]), *(_cell(arm, measure) for measure in measures)]
        for arm in document["arms"]
    ]
    table = pd.DataFrame(rows, columns=["Arm", *measures.values()])
    notes = "\n".join(f"- {plain_markdown(note)}" for note in document["notes"])
    return (
        f"**{document['headline']}**\n\n{table.to_markdown(index=False, disable_numparse=True)}"
        f"\n\nIn %, with 95 % intervals; below, the difference to vanilla in points.\n\n{notes}\n"
    )


def plain_markdown(text: str) -> str:
    """Keep names and prompts from being read as Markdown, HTML or a terminal's codes; one line."""
    shown = "".join(mark for mark in text if mark.isprintable() or mark.isspace())
    return " ".join(shown.translate(_MARKDOWN).split())


_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|#~&!"})


def _cell(arm: Mapping[str, Any], measure: str) -> str:
    value, low, high = (f"{100 * number:.1f}" for number in _triple(arm[measure]))
    shown = f"{value} ({low} to {high})"
    if not arm["difference"]:
        return shown
    difference = arm["difference"][measure]
    return f"{shown}<br>{in_points(difference['value'])}{_VERDICTS[_verdict(difference)]}"


def _verdict(difference: Mapping[str, Any]) -> int | None:
    """Return 1 for better, -1 for worse, 0 for no significant difference, None where not judged."""
    if difference["significant"] is None:
        return None
    return int(np.sign(difference["value"])) if difference["significant"] else 0


_VERDICTS = {1: ", better", -1: ", worse", 0: ", no significant difference", None: ""}


# The plots


@dataclass(frozen=True)
class _Plot:
    png: bytes
    alt: str


def _plots(
    inputs: ReportInputs, document: Mapping[str, Any], theme: pictures.Theme
) -> dict[str, _Plot]:
    """Draw the report's plots, by the names of their files."""
    arms = document["arms"]
    drawn = _drawn(arms)
    plots = {}
    if any(arm["difference"] for arm in arms):
        plots["differences"] = _differences_plot(document, theme)
    plots["fgsm"] = _fgsm_plot(drawn, theme)
    plots |= _corruption_plots(arms, theme)
    plots["reliability"] = _reliability_plot(drawn, theme)
    if document["confusion"] and document["confusion"]["classes"]:
        plots["confusion"] = _confusion_plot(document["confusion"], theme)
    if document["few_images"]:
        plots["few_images"] = _few_images_plot(document["few_images"], theme)
    if inputs.curves:
        plots["learning_curves"] = _learning_plot(inputs.curves, theme)
    plots["class_counts"] = _Plot(
        pictures.class_histogram(inputs.counts, theme=theme),
        "Bars of the number of images in each class, by split. "
        + "; ".join(f"{split}: {sum(n.values())}" for split, n in inputs.counts.items()),
    )
    return plots


def _drawn(arms: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the arms that are drawn as lines: vanilla, the subjects, and the best others."""

    def place(arm: Mapping[str, Any]) -> tuple[bool, float]:
        return arm["arm"] not in (BASELINE, *SUBJECTS), -arm["overall"]["value"]

    chosen = [arm["arm"] for arm in sorted(arms, key=place)[:_ARMS_DRAWN]]
    return [arm for arm in arms if arm["arm"] in chosen]


def _differences_plot(document: Mapping[str, Any], theme: pictures.Theme) -> _Plot:
    compared = [arm for arm in document["arms"] if arm["difference"]]
    intervals = {
        title: {title_of(arm["arm"]): _triple(arm["difference"][measure]) for arm in compared}
        for measure, title in _measures(document).items()
        if measure != "ece"
    }
    significant = {
        (title, title_of(arm["arm"]))
        for measure, title in _measures(document).items()
        for arm in compared
        if arm["difference"][measure]["significant"]
    }
    label = "accuracy against vanilla, points\n(filled: a significant difference)"
    alt = "Differences in accuracy to vanilla with 95 % intervals. " + "; ".join(
        f"{name}, {arm}: {in_points(value)} ({in_points(low)} to {in_points(high)})"
        for name, of_arm in intervals.items()
        for arm, (value, low, high) in of_arm.items()
    )
    return _Plot(pictures.differences(intervals, significant, label=label, theme=theme), alt)


def _fgsm_plot(arms: Sequence[Mapping[str, Any]], theme: pictures.Theme) -> _Plot:
    strengths = [0.0, *(point["epsilon"] for point in arms[0]["fgsm_by_epsilon"])]
    accuracies = {
        title_of(arm["arm"]): [_triple(point) for point in (arm["clean"], *arm["fgsm_by_epsilon"])]
        for arm in arms
    }
    alt = "Accuracy over FGSM strength with 95 % intervals. " + "; ".join(
        f"{arm}: "
        + ", ".join(
            f"{s:g}/255 {_percent(point[0])}" for s, point in zip(strengths, points, strict=True)
        )
        for arm, points in accuracies.items()
    )
    label = "FGSM strength ε, in 1/255 (0: clean)"
    return _Plot(pictures.accuracy_curves(strengths, accuracies, label=label, theme=theme), alt)


def _few_images_plot(few: Sequence[Mapping[str, Any]], theme: pictures.Theme) -> _Plot:
    numbers = sorted({point["per_class"] for point in few})
    curves = {
        title_of(arm): [_triple(point) for point in points]
        for arm, points in groupby(few, key=lambda point: point["arm"])
    }
    alt = "Clean accuracy over training images a class. " + "; ".join(
        f"{arm}: "
        + ", ".join(f"{n} {_percent(p[0])}" for n, p in zip(numbers, points, strict=True))
        for arm, points in curves.items()
    )
    label = "training images a class"
    return _Plot(pictures.accuracy_curves(numbers, curves, label=label, theme=theme), alt)


def _corruption_plots(arms: Sequence[Mapping[str, Any]], theme: pictures.Theme) -> dict[str, _Plot]:
    """Draw vanilla's map, that of the subject, and what each arm gained and lost by family."""
    tables = {
        arm["arm"]: pd.DataFrame(arm["corruptions"]).pivot_table(
            "value", "family", "severity", sort=False
        )
        for arm in arms
    }
    base = tables.get(BASELINE)
    subject = next((arm for arm in SUBJECTS if arm in tables), next(reversed(tables)))
    plots = {
        f"corruptions_{slug(arm)}": _corruption_map(
            tables[arm], f"{title_of(arm)}: accuracy, %", theme
        )
        for arm in dict.fromkeys((BASELINE, subject))
        if arm in tables
    }
    if base is None or len(tables) == 1:
        return plots
    by_severity = tables[subject] - base
    by_arm = pd.DataFrame(
        {title_of(arm): (t - base).mean(axis=1) for arm, t in tables.items() if arm != BASELINE}
    )
    # One scale for both; and differences of a few points stay pale.
    reach = max(0.1, *(float(t.abs().to_numpy().max()) for t in (by_severity, by_arm)))
    title = f"{title_of(subject)} less vanilla, points"
    plots[f"corruptions_{subject}_difference"] = _corruption_map(by_severity, title, theme, reach)
    if len(by_arm.columns) > 1:
        title = "Arms less vanilla, points"
        plots["corruptions_by_arm"] = _corruption_map(by_arm, title, theme, reach)
    return plots


def _corruption_map(
    table: pd.DataFrame, title: str, theme: pictures.Theme, reach: float | None = None
) -> _Plot:
    """Draw a row a family, a column a severity or an arm."""
    number: Callable[[float], str] = _percent if reach is None else in_points
    alt = f"{title}, by {table.columns.name or 'arm'}: {', '.join(map(str, table.columns))}. "
    alt += "; ".join(
        f"{_spoken(family)}: {', '.join(map(number, values))}"
        for family, values in zip(table.index, table.to_numpy(), strict=True)
    )
    png = pictures.heat_map(
        table.to_numpy(),
        [_spoken(family) for family in table.index],
        [str(column) for column in table.columns],
        title=title,
        label=table.columns.name or "",
        reach=reach,
        theme=theme,
    )
    return _Plot(png, alt)


def _confusion_plot(confusion: Mapping[str, Any], theme: pictures.Theme) -> _Plot:
    names, change = confusion["classes"], np.array(confusion["change"])
    title = "Change of answers against vanilla, points"
    moves = [
        (abs(change[i, j]), f"{names[i]} called {names[j]} {in_points(change[i, j])}")
        for i in range(len(names))
        for j in range(len(names))
    ]
    most = [words for size, words in sorted(moves, reverse=True)[:6] if size]
    png = pictures.heat_map(
        change, names, names,
        title=title, label="called", reach=max(0.1, float(np.abs(change).max())), theme=theme,
    )  # fmt: skip
    return _Plot(png, f"{title}: rows are true classes, columns answers. {'; '.join(most)}")


def _reliability_plot(arms: Sequence[Mapping[str, Any]], theme: pictures.Theme) -> _Plot:
    curves = {}
    for arm in arms:
        curve = pd.DataFrame(arm["reliability"]).astype(float)
        curves[title_of(arm["arm"])] = curve.assign(share=curve["images"] / curve["images"].sum())
    alt = "Accuracy over confidence; on the diagonal, confidence is right. Calibration error: "
    alt += "; ".join(f"{title_of(arm['arm'])} {arm['ece']['value']:.3f}" for arm in arms)
    return _Plot(pictures.reliability_diagram(curves, theme=theme), alt)


def _learning_plot(curves: Mapping[tuple[Arm, int], pd.DataFrame], theme: pictures.Theme) -> _Plot:
    """Draw each arm's curve, averaged over training seeds."""
    arms = sorted({arm for arm, _ in curves}, key=in_order)
    columns = ["train_loss", "val_accuracy"]
    averaged = {
        title_of(arm): pd.concat([curve for (name, _), curve in curves.items() if name == arm])
        .groupby("step")[columns]
        .mean()
        .reset_index()
        for arm in arms
    }
    alt = (
        "Training loss and accuracy on val over optimiser steps. Best accuracy on val: "
        + "; ".join(
            f"{arm} {_percent(curve['val_accuracy'].max())}" for arm, curve in averaged.items()
        )
    )
    return _Plot(pictures.learning_curves(averaged, theme=theme), alt)


def _triple(estimate: Mapping[str, float]) -> pictures.Interval:
    return estimate["value"], estimate["low"], estimate["high"]


def _spoken(name: str) -> str:
    return name.replace("_", " ")


# The page


def _page(
    document: Mapping[str, Any],
    light: Mapping[str, _Plot],
    dark: Mapping[str, _Plot],
    inputs: ReportInputs,
) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": _percent,
        "points": in_points,
        "spoken": _spoken,
        "data_uri": _data_uri,
        "unbroken": lambda text: text.replace(" %", "\u00a0%"),
        "title_of": title_of,
        "counted": counted,
        "css_width": lambda png: _width(png) // 2,
    }
    template = resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(
        document,
        light=light,
        dark=dark,
        stages=inputs.stages,
        audit_sheet=inputs.audit.sheet if inputs.audit else None,
        epsilon=_epsilon(document["fgsm_epsilon"]),
        light_arms=len(_drawn(document["arms"])),
        corruption_rows=_corruption_rows(document["arms"]),
        class_rows=_class_rows(document["arms"]),
        split_rows=_split_rows(document["data"]),
        setting_rows=_setting_rows(document["settings"]),
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _width(png: bytes) -> int:
    return Image.open(io.BytesIO(png)).width


def _corruption_rows(arms: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return each family and its rows: a row a severity, holding an estimate an arm."""
    rows = zip(*(arm["corruptions"] for arm in arms), strict=True)
    by_family = groupby(rows, key=lambda of_arms: of_arms[0]["family"])
    return [(family, list(group)) for family, group in by_family]


def _class_rows(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the classes that have test images; of very many, those where the arms differ most."""
    rows = [
        {
            "class": of_arms[0]["class"],
            "images": of_arms[0]["images"],
            "accuracies": [one["accuracy"] for one in of_arms],
        }
        for of_arms in zip(*(arm["classes"] for arm in arms), strict=True)
        if of_arms[0]["images"]
    ]
    if len(rows) > _CLASSES_SHOWN:

        def spread(row: Mapping[str, Any]) -> float:
            return max(row["accuracies"]) - min(row["accuracies"])

        rows = sorted(rows, key=spread, reverse=True)[:_CLASSES_SHOWN]
    return rows


def _split_rows(data: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Return each split's images and classes."""
    return [
        (split, sum(of_class.values()), sum(1 for images in of_class.values() if images))
        for split, of_class in data["counts"].items()
    ]


def _setting_rows(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += _setting_rows(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _setting(value)))
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    if value is None or value == "":
        return "–"
    return value if isinstance(value, str) else json.dumps(value).removesuffix(".0")
