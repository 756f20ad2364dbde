"""What a report says in words: its headline, its notes, and its page for a pull request.

What belongs here: sentences, and how numbers are written in them. What does not: the numbers
(comparison), what arms and measures are called (written_report), plots (report_plots).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.manifest import without_images
from diffusemix_pipeline.editing.editor import BUNDLED
from diffusemix_pipeline.evaluation.comparison import WITH_EDITS
from diffusemix_pipeline.evaluation.statistics import uneven_seeds
from diffusemix_pipeline.evaluation.written_report import (
    measure_titles,
    of_255,
    plain_markdown,
    title_of,
)
from diffusemix_pipeline.training.arms import SUBJECTS

_NAMED = 5  # classes, in a sentence
_NEAR_ZERO = 0.1  # accuracy: one survivor of sixteen tells no more than none


def headline(document: Mapping[str, Any]) -> str:
    """Say in a sentence what DiffuseMix did to each accuracy, and which rivals it fell behind."""
    compared = [arm for arm in document["arms"] if arm["difference"]]
    images = f"{document['test_images']:,} test images"
    seeds = len(document["training_seeds"])
    trained = f"{seeds} training seeds"
    if seeds == 1:
        trained = "one training seed (another may say otherwise)"
    if not compared:
        arms = ", ".join(
            f"{title_of(arm['arm'])} {percent(arm['clean']['value'])} clean, "
            f"{percent(arm['corrupted']['value'])} corrupted and "
            f"{percent(arm['fgsm']['value'])} FGSM accuracy"
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
        "fgsm": f"FGSM accuracy at {of_255(document['fgsm_epsilon'])}",
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
    if "corrupted_unshared" in measure_titles(document):
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
    value, low, high = map(in_points, triple(difference))
    return f"{value} points, {low} to {high}"


def notes(document: Mapping[str, Any]) -> list[str]:
    """Say what the numbers do not show, a note each."""
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
    left = f"under {name} at {of_255(attacks['epsilon'])} next to nothing is left"
    words = []
    at_the_same = [arm for epsilon, arm in risen if epsilon == attacks["epsilon"]]
    if at_the_same:
        words.append(
            f"FGSM accuracy at {of_255(attacks['epsilon'])} rose for {_listed(at_the_same)}, "
            f"while {left}: this is not adversarial robustness. A real attacker takes more than "
            "one step."
        )
    if elsewhere := [(epsilon, arm) for epsilon, arm in risen if arm not in at_the_same]:
        strengths = [of_255(epsilon) for epsilon in sorted({epsilon for epsilon, _ in elsewhere})]
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
            f"{of_255(attacks['epsilon'])}."
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
        f"{title_of(arm)}: {', '.join(map(spoken, families))}"
        for arm, families in shared["arms"].items()
    ] + [
        f"{prompt} edits: {', '.join(map(spoken, families))}"
        for prompt, families in shared["prompts"].items()
    ]
    words = (
        "Some arms are shown corruptions in training: "
        f"{', '.join(map(spoken, shared['left_out']))} ({'; '.join(by_whom)}). "
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


def markdown(document: Mapping[str, Any]) -> str:
    """Return the report for a pull request: the headline, a table, and what it does not show."""
    measures = measure_titles(document)
    rows = [
        [plain_markdown(title_of(arm["arm"])), *(_cell(arm, measure) for measure in measures)]
        for arm in document["arms"]
    ]
    table = pd.DataFrame(rows, columns=["Arm", *measures.values()])
    notes = "\n".join(f"- {plain_markdown(note)}" for note in document["notes"])
    return (
        f"**{plain_markdown(document['headline'])}**\n\n"
        f"{table.to_markdown(index=False, disable_numparse=True)}"
        f"\n\nIn %, with 95 % intervals; below, the difference to vanilla in points.\n\n{notes}\n"
    )


def _cell(arm: Mapping[str, Any], measure: str) -> str:
    value, low, high = (f"{100 * number:.1f}" for number in triple(arm[measure]))
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


def percent(share: float) -> str:
    """Write a share of 1."""
    return f"{100 * share:.1f} %"


def in_points(share: float) -> str:
    """Return a difference of two shares in points, signed."""
    return f"{100 * share:+.1f}".replace("-", "−")


def triple(estimate: Mapping[str, float]) -> tuple[float, float, float]:
    """Return a value, and the low and high end of its interval."""
    return estimate["value"], estimate["low"], estimate["high"]


def spoken(name: str) -> str:
    """Write the name of a family of corruption."""
    return name.replace("_", " ")
