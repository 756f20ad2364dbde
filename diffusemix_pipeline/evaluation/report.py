"""The report: evidence of every arm becomes a JSON document, and that a page with plots.

What belongs here: what the document and the page hold, and writing them. What does not: computing
evidence, the numbers (comparison), words (report_text), plots (report_plots), what a written report
says (written_report). The report is a function of its inputs: it holds no date, host or run id, so
the same evidence gives the same bytes. `docs/report.md` explains every number.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
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
from diffusemix_pipeline.datasets.manifest import SPLITS
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.attacks import autoattack_attacks
from diffusemix_pipeline.evaluation.audit import Audit
from diffusemix_pipeline.evaluation.comparison import (
    Comparison,
    arm_documents,
    by_arm,
    class_documents,
    confusion_document,
    few_images_document,
    reliability_document,
    rival_documents,
    rounded,
    shared_families,
)
from diffusemix_pipeline.evaluation.evidence import Evidence
from diffusemix_pipeline.evaluation.published_corruptions import counted
from diffusemix_pipeline.evaluation.report_plots import Plot, draw_plots, drawn_arms
from diffusemix_pipeline.evaluation.report_text import (
    headline,
    in_points,
    markdown,
    notes,
    percent,
    spoken,
)
from diffusemix_pipeline.evaluation.written_report import (
    DOCUMENT,
    MARKDOWN,
    PAGE,
    SCHEMA_VERSION,
    Report,
    of_255,
    read_report,
    title_of,
)
from diffusemix_pipeline.files import replaced_folder, write_bytes, write_json
from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.settings import Arm, Settings
from diffusemix_pipeline.training.arms import BASELINE, SUBJECTS

CODE_VERSION = "12"
_CLASSES_SHOWN = 30


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


def write_report(inputs: ReportInputs, out: Path, *, aside: Path) -> Report:
    """Write `index.html`, `report.md`, `report.json` and plots as PNG files into the folder `out`.

    The folder is replaced as a whole. `aside` lies on the same file system, outside of anything
    versioned. Raises UserError where the evidence is empty or not all on the same test images and
    settings.
    """
    _check(inputs.evidence)
    document = _document(inputs)
    light = draw_plots(document, inputs.curves, pictures.LIGHT)
    dark = draw_plots(document, inputs.curves, pictures.DARK)
    page = _page(document, light, dark, inputs)
    with replaced_folder(out, mark=DOCUMENT, aside=aside) as folder:
        write_bytes(folder / PAGE, page.encode("utf-8", "replace"))
        write_bytes(folder / MARKDOWN, markdown(document).encode())
        write_json(folder / DOCUMENT, document)
        files = {name: plot.png for name, plot in light.items()}
        if inputs.stages is not None:
            files["stages"] = inputs.stages
        if inputs.audit and inputs.audit.sheet is not None:
            files["audit"] = inputs.audit.sheet
        for name, png in files.items():
            write_bytes(folder / f"{name}.png", png)
    return read_report(out)


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
            "counts": {s: dict(inputs.counts[s]) for s in SPLITS if s in inputs.counts},
            "copies_across_splits": [dict(copy) for copy in inputs.copies],
            "set_aside": [dict(image) for image in inputs.set_aside],
            "test_reads": inputs.test_reads,
        },
        "settings": settings.model_dump(mode="json", exclude={"tracking"}),
        "versions": dict(inputs.versions),
    }
    document["headline"] = headline(document)
    document["notes"] = notes(document)
    return document


def _rounded_case(case: Mapping[str, Any]) -> dict[str, Any]:
    nearest = [{**near, "similarity": rounded(near["similarity"])} for near in case["nearest"]]
    return {**case, "confidence": rounded(case["confidence"]), "nearest": nearest}


# The page


def _page(
    document: Mapping[str, Any],
    light: Mapping[str, Plot],
    dark: Mapping[str, Plot],
    inputs: ReportInputs,
) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "points": in_points,
        "spoken": spoken,
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
        epsilon=of_255(document["fgsm_epsilon"]),
        light_arms=len(drawn_arms(document["arms"])),
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
    if value in (None, "", []):
        return "none"
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return value if isinstance(value, str) else json.dumps(value).removesuffix(".0")
