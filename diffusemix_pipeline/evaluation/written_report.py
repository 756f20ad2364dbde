"""A written report: where it lies, what it says, and what its arms and measures are called.

What belongs here: what whoever reads a report needs, be it one sentence. What does not: making one
(report), so nothing of this loads torch or matplotlib.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import undamaged

DOCUMENT = "report.json"
PAGE = "index.html"
MARKDOWN = "report.md"
SCHEMA_VERSION = 7
MEASURES = ("clean", "corrupted", "fgsm", "ece")
LOSSES = {"brier": "Brier score", "nll": "NLL"}
"""The measures that are no shares, and their titles."""
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
    """What was judged: see `report.ReportInputs`."""
    titles: Mapping[str, str]
    """What the summary's measures are called."""
    left_out: tuple[str, ...]
    """The families of corruption that some arm was shown in training."""
    folder: Path
    html: Path
    json: Path
    plots: tuple[Path, ...]


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
            titles=measure_titles(document),
            left_out=tuple(document["shared_families"]["left_out"]),
            folder=folder,
            html=folder / PAGE,
            json=path,
            plots=tuple(sorted(folder.glob("*.png"))),
        )


def _summary(document: Mapping[str, Any]) -> pd.DataFrame:
    rows = []
    for arm in document["arms"]:
        row = {"arm": arm["arm"]}
        for measure in measure_titles(document):
            against = (arm["difference"] or {}).get(measure, {})
            for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high")):
                row[f"{measure}{suffix}"] = arm[measure][end]
                row[f"{measure}_difference{suffix}"] = against.get(end, math.nan)
        rows.append(row)
    return pd.DataFrame(rows).set_index("arm")


def measure_titles(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the titles of `MEASURES`, and of `corrupted_unshared` where that is not all."""
    titles = {
        "clean": "Clean",
        "corrupted": "Corrupted",
        "corrupted_unshared": "Corrupted, unshared",
        "fgsm": f"FGSM {of_255(document['fgsm_epsilon'])}",
        "ece": "Calibration error",
    }
    return {name: title for name, title in titles.items() if document["arms"][0][name]}


def more_titles(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the titles of an arm's other measures."""
    at = of_255(document["attacks"]["epsilon"])
    titles = {
        "overall": "Overall",
        "mce_to_vanilla": "mCE, normalised by vanilla",
        "mce_to_vanilla_unshared": "mCE, normalised, unshared",
        "published": "Published sets",
        "fgsm_attack": f"FGSM {at}",
        "pgd": f"PGD-20 {at}",
        "autoattack": f"AutoAttack {at}",
        **LOSSES,
    }
    if document["attacks"]["epsilon"] == document["fgsm_epsilon"]:
        del titles["fgsm_attack"]  # which is `fgsm` then
    return titles


def title_of(arm: str) -> str:
    """Return an arm's name for people."""
    return _TITLES.get(arm) or Path(arm).stem


def of_255(strength: float) -> str:
    """Write the strength of an attack, which is in units of 1/255."""
    return f"{strength:g}/255"


def plain_markdown(text: str) -> str:
    """Keep names and prompts from being read as Markdown, HTML or a terminal's codes; one line."""
    shown = "".join(mark for mark in text if mark.isprintable() or mark.isspace())
    return " ".join(shown.translate(_MARKDOWN).split())


_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|#~&!"})
