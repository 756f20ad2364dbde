"""How often each version of the test images was read, over the project's life on this machine."""

import json
from collections.abc import Iterable
from pathlib import Path

from diffusemix_pipeline.datasets.columns import tuples
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.files import undamaged, write_json
from diffusemix_pipeline.identity import digest


def version_of_test(raw: Stage) -> str:
    """Identify the test images by their content and labels."""
    rows = raw.manifest(["split", "label", "sha256"]).query("split == 'test'")
    return digest(sorted(tuples(rows[["label", "sha256"]])))


def count_reads(path: Path, version: str) -> int:
    """Return how often this version of the test images was read."""
    return len(_reads(path).get(version, []))


def record_reads(path: Path, version: str, readings: Iterable[str]) -> int:
    """Note readings of this version of the test images; return how many there were by now.

    A reading is one model's evaluation under one choice of attacks and corruptions. The same one
    counts once: looking again at what is known chooses nothing.
    """
    reads = _reads(path)
    known = reads.get(version, [])
    reads[version] = list(dict.fromkeys([*known, *readings]))
    if reads[version] != known:
        write_json(path, reads)
    return len(reads[version])


def _reads(path: Path) -> dict[str, list[str]]:
    if not path.exists():
        return {}
    with undamaged(path, "Restore it, or remove it: readings are then counted from none."):
        return dict(json.loads(path.read_text("utf-8")))
