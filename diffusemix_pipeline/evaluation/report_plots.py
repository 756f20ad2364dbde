"""A report's plots, each with what it says to those who do not see it.

What belongs here: which numbers are drawn of which arms. What does not: drawing (pictures), the
numbers (comparison).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from diffusemix_pipeline import pictures
from diffusemix_pipeline.evaluation.comparison import in_order
from diffusemix_pipeline.evaluation.report_text import in_points, percent, spoken, triple
from diffusemix_pipeline.evaluation.written_report import measure_titles, title_of
from diffusemix_pipeline.settings import Arm
from diffusemix_pipeline.training.arms import BASELINE, SUBJECTS, slug

_ARMS_DRAWN = 6  # as lines: more cannot be told apart


@dataclass(frozen=True)
class Plot:
    """A PNG, and its content in words."""

    png: bytes
    alt: str


def draw_plots(
    document: Mapping[str, Any],
    curves: Mapping[tuple[Arm, int], pd.DataFrame],
    theme: pictures.Theme,
) -> dict[str, Plot]:
    """Draw the report's plots, by the names of their files.

    `curves` is (arm, training seed) -> columns step, train_loss, val_accuracy.
    """
    arms = document["arms"]
    drawn = drawn_arms(arms)
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
    if curves:
        names = [arm["arm"] for arm in drawn]
        plots["learning_curves"] = _learning_plot(
            {key: curve for key, curve in curves.items() if key[0] in names}, theme
        )
    counts = document["data"]["counts"]
    plots["class_counts"] = Plot(
        pictures.class_histogram(counts, theme=theme),
        "Bars of the number of images in each class, by split. "
        + "; ".join(f"{split}: {sum(n.values())}" for split, n in counts.items()),
    )
    return plots


def drawn_arms(arms: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the arms that are drawn as lines: vanilla, the subjects, and the best others."""

    def place(arm: Mapping[str, Any]) -> tuple[bool, float]:
        return arm["arm"] not in (BASELINE, *SUBJECTS), -arm["overall"]["value"]

    chosen = [arm["arm"] for arm in sorted(arms, key=place)[:_ARMS_DRAWN]]
    return [arm for arm in arms if arm["arm"] in chosen]


def _differences_plot(document: Mapping[str, Any], theme: pictures.Theme) -> Plot:
    compared = [arm for arm in document["arms"] if arm["difference"]]
    intervals = {
        title: {title_of(arm["arm"]): triple(arm["difference"][measure]) for arm in compared}
        for measure, title in measure_titles(document).items()
        if measure != "ece"
    }
    significant = {
        (title, title_of(arm["arm"]))
        for measure, title in measure_titles(document).items()
        for arm in compared
        if arm["difference"][measure]["significant"]
    }
    label = "← worse than vanilla, points, better →\n(filled: a significant difference)"
    alt = "Differences in accuracy to vanilla with 95 % intervals. " + "; ".join(
        f"{name}, {arm}: {in_points(value)} ({in_points(low)} to {in_points(high)})"
        for name, of_arm in intervals.items()
        for arm, (value, low, high) in of_arm.items()
    )
    return Plot(pictures.differences(intervals, significant, label=label, theme=theme), alt)


def _fgsm_plot(arms: Sequence[Mapping[str, Any]], theme: pictures.Theme) -> Plot:
    strengths = [0.0, *(point["epsilon"] for point in arms[0]["fgsm_by_epsilon"])]
    accuracies = {
        title_of(arm["arm"]): [triple(point) for point in (arm["clean"], *arm["fgsm_by_epsilon"])]
        for arm in arms
    }
    alt = "Accuracy over FGSM strength with 95 % intervals. " + "; ".join(
        f"{arm}: "
        + ", ".join(
            f"{s:g}/255 {percent(point[0])}" for s, point in zip(strengths, points, strict=True)
        )
        for arm, points in accuracies.items()
    )
    label = "FGSM strength ε, in 1/255 (0: clean)"
    return Plot(pictures.accuracy_curves(strengths, accuracies, label=label, theme=theme), alt)


def _few_images_plot(few: Sequence[Mapping[str, Any]], theme: pictures.Theme) -> Plot:
    numbers = sorted({point["per_class"] for point in few})
    curves = {
        title_of(arm): [triple(point) for point in points]
        for arm, points in groupby(few, key=lambda point: point["arm"])
    }
    alt = "Clean accuracy over training images a class. " + "; ".join(
        f"{arm}: " + ", ".join(f"{n} {percent(p[0])}" for n, p in zip(numbers, points, strict=True))
        for arm, points in curves.items()
    )
    label = "training images a class"
    return Plot(pictures.accuracy_curves(numbers, curves, label=label, theme=theme), alt)


def _corruption_plots(arms: Sequence[Mapping[str, Any]], theme: pictures.Theme) -> dict[str, Plot]:
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
            tables[arm], f"{pictures.shortened(title_of(arm))}: accuracy, %", theme
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
    title = f"{pictures.shortened(title_of(subject))} less vanilla, points"
    plots[f"corruptions_{slug(subject)}_difference"] = _corruption_map(
        by_severity, title, theme, reach
    )
    if len(by_arm.columns) > 1:
        title = "Arms less vanilla, points"
        plots["corruptions_by_arm"] = _corruption_map(by_arm, title, theme, reach)
    return plots


def _corruption_map(
    table: pd.DataFrame, title: str, theme: pictures.Theme, reach: float | None = None
) -> Plot:
    """Draw a row a family, a column a severity or an arm."""
    number: Callable[[float], str] = percent if reach is None else in_points
    alt = f"{title}, by {table.columns.name or 'arm'}: {', '.join(map(str, table.columns))}. "
    alt += "; ".join(
        f"{spoken(family)}: {', '.join(map(number, values))}"
        for family, values in zip(table.index, table.to_numpy(), strict=True)
    )
    png = pictures.heat_map(
        table.to_numpy(),
        [spoken(family) for family in table.index],
        [str(column) for column in table.columns],
        title=title,
        label=table.columns.name or "",
        reach=reach,
        theme=theme,
    )
    return Plot(png, alt)


def _confusion_plot(confusion: Mapping[str, Any], theme: pictures.Theme) -> Plot:
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
        title=title, label="answer", row_label="true class",
        reach=max(0.1, float(np.abs(change).max())), better=2 * np.eye(len(names)) - 1, theme=theme,
    )  # fmt: skip
    return Plot(png, f"{title}: rows are true classes, columns answers. {'; '.join(most)}")


def _reliability_plot(arms: Sequence[Mapping[str, Any]], theme: pictures.Theme) -> Plot:
    curves = {}
    for arm in arms:
        curve = pd.DataFrame(arm["reliability"]).astype(float)
        curves[title_of(arm["arm"])] = curve.assign(share=curve["images"] / curve["images"].sum())
    alt = "Accuracy over confidence; on the diagonal, confidence is right. Calibration error: "
    alt += "; ".join(f"{title_of(arm['arm'])} {arm['ece']['value']:.3f}" for arm in arms)
    return Plot(pictures.reliability_diagram(curves, theme=theme), alt)


def _learning_plot(curves: Mapping[tuple[Arm, int], pd.DataFrame], theme: pictures.Theme) -> Plot:
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
            f"{arm} {percent(curve['val_accuracy'].max())}" for arm, curve in averaged.items()
        )
    )
    return Plot(pictures.learning_curves(averaged, theme=theme), alt)
