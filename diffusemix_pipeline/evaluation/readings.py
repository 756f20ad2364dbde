"""By how many models each version of the test images was read, over the project's life."""

import json
from pathlib import Path

from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.files import write_json
from diffusemix_pipeline.identity import digest


def version_of_test(raw: Stage) -> str:
    """Identify the test images by their content and labels."""
    rows = raw.manifest().query("split == 'test'")
    return digest(rows[["image_id", "label", "sha256"]].to_csv(index=False))


def record_read(path: Path, version: str, model: str) -> int:
    """Note that `model` reads this version of the test images; return how many models have by now.

    The same model counts once: looking again at what is known chooses nothing.
    """
    reads: dict[str, list[str]] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    readers = reads.setdefault(version, [])
    if model not in readers:
        readers.append(model)
        write_json(path, reads)
    return len(readers)
