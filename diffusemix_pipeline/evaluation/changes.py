"""What changed from one report to another: two `report.json` become a page of Markdown.

What belongs here: which numbers, settings and versions differ. What does not: finding the reports.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.written_report import (
    DOCUMENT,
    LOSSES,
    SCHEMA_VERSION,
    measure_titles,
    more_titles,
    plain_markdown,
    title_of,
)

_SHAPES_NUMBERS = (
    "seed", "size", "evaluation.corruptions", "evaluation.severities", "evaluation.attack_epsilon",
    "evaluation.attack_images", "evaluation.autoattack_images",
)  # fmt: skip
"""The settings that say on what, and by what, classifiers are judged."""
_SCHEMA = Path(__file__).with_name("report.schema.json")
_INTERVALS = (
    "Shares in %, their changes in points (Brier score and NLL are none); in brackets 95 % "
    "intervals, which take the reports to be independent of each other and are not corrected for "
    "how many there are. By chance alone some leave zero out; with one training seed more of them, "
    "as another seed gives other numbers."
)


def read_document(place: Path) -> dict[str, Any]:
    """Read a report's folder, or its `report.json`; UserError where there is none that fits."""
    path = place / DOCUMENT if place.is_dir() else place
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{place} holds no report: {error}. `diffusemix run` makes one in outputs/report."
        ) from None
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path} is no report of schema version {SCHEMA_VERSION}: make it again with this "
            "version of the package."
        )
    schema = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    if problem := best_match(Draft202012Validator(schema).iter_errors(document)):
        raise UserError(
            f"{path} is no whole report: at {problem.json_path}, {problem.message:.300}. "
            "`diffusemix run` makes it again."
        )
    return document


def changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Return, as Markdown, what the second report says otherwise than the first."""
    parts = [
        f"First: {plain_markdown(first['headline'])}",
        f"Second: {plain_markdown(second['headline'])}",
        *_warnings(first, second),
        _measures(first, second),
    ]
    for title, key in (("Settings", "settings"), ("Versions", "versions")):
        rows = _differing(dict(_flat(first[key])), dict(_flat(second[key])))
        parts.append(f"{title} that differ:\n\n{rows}" if rows else f"{title}: no difference.")
    return "\n\n".join(parts) + "\n"


def _warnings(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    if first["versions"].get("test") != second["versions"].get("test"):
        yield "**The test images are not the same**: a difference may be theirs."
    theirs, ours = (dict(_flat(document["settings"])) for document in (first, second))
    for what in _SHAPES_NUMBERS:
        if theirs.get(what) != ours.get(what):
            yield f"**{what} is not the same**: what depends on it does not compare."
    if first["shared_families"]["left_out"] != second["shared_families"]["left_out"]:
        yield "**Other families of corruption are left out** of what is unshared."
    if first["fgsm_epsilon"] != second["fgsm_epsilon"]:
        yield "**The FGSM strengths are not the same**."


def _measures(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    ours, theirs = ({arm["arm"]: arm for arm in document["arms"]} for document in (first, second))
    titles = {**measure_titles(second), **more_titles(second)}
    rows = []
    for arm in theirs:
        for measure, title in titles.items():
            before, after = ours.get(arm, {}).get(measure), theirs[arm][measure]
            if before and after:
                shown = _change(before, after, percent=measure not in LOSSES)
                rows.append([plain_markdown(title_of(arm)), title, *shown])
    if not rows:
        return "No arm is in both reports."
    missing = [plain_markdown(title_of(arm)) for arm in sorted(ours.keys() ^ theirs.keys())]
    table = pd.DataFrame(rows, columns=["arm", "measure", "first", "second", "change"])
    parts = [table.to_markdown(index=False, disable_numparse=True), _INTERVALS]
    parts += [f"In one report only: {', '.join(missing)}."] if missing else []
    return "\n\n".join(parts)


def _change(before: Mapping[str, float], after: Mapping[str, float], *, percent: bool) -> list[str]:
    """Return both values, their difference and its interval, and whether that holds zero.

    The interval takes the two to be independent. Both were mostly taken on the same test images, so
    it errs on the wide side.
    """
    difference = after["value"] - before["value"]
    down = math.hypot(after["value"] - after["low"], before["high"] - before["value"])
    up = math.hypot(after["high"] - after["value"], before["value"] - before["low"])
    interval = (difference - down, difference + up)
    scale, digits = (100, 1) if percent else (1, 3)
    change, low, high = (
        f"{scale * number:+.{digits}f}".replace("-", "−") for number in (difference, *interval)
    )
    values = [f"{scale * each['value']:.{digits}f}" for each in (before, after)]
    verdict = ", no significant difference" if interval[0] <= 0 <= interval[1] else ""
    return [*values, f"{change} ({low} to {high}){verdict}"]


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    rows = [
        [plain_markdown(key), *(plain_markdown(_shown(v.get(key))) for v in (first, second))]
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    ]
    table = pd.DataFrame(rows, columns=["what", "first", "second"])
    return table.to_markdown(index=False, disable_numparse=True) if rows else ""


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
