"""Broken images by the thousand through `raw_dataset`: none may end it, and each is accounted for.

    python -m benchmarks.fuzz [--files 10000] [--seed 0]

Whole pictures in every format that PIL writes are cut off, overwritten, spliced and given bytes
that say other sizes, under names that a person would hardly choose, in a few classes with links and
empty folders between them. The asset is materialized by Dagster, once and again. Each file must be
in the manifest or set aside with its reason, what is used must read back as the picture that the
manifest says, and no file of the source may have changed.
"""

import argparse
import io
import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.scale import materialize
from diffusemix_pipeline.datasets.images import read_rgb
from diffusemix_pipeline.datasets.manifest import read_stage
from diffusemix_pipeline.identity import file_sha256
from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

_CLASSES = ["cat", "-rf", "q'\"`$()", "<b>&co", "ünï ☃", "a..b", "x" * 250]
_MODES = ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]
_STEMS = [
    "a b",
    "q'\"",
    "ünï ☃",
    "a..b",
    "new\nline",
    "-rf",
    "x" * 200,
    "%2e%2e",
    "back\\slash",
    "é\t",
]


def whole_images(draw: random.Random) -> list[tuple[str, bytes]]:
    """Return small pictures as (suffix, bytes): each mode in each format that takes it."""
    Image.init()
    found = []
    for suffix, name in sorted(Image.registered_extensions().items()):
        for mode in _MODES:
            picture = _picture(draw, mode)
            buffer = io.BytesIO()
            with suppress(Exception):  # most formats take few modes
                if name in Image.SAVE and name not in ("PDF", "EPS"):
                    picture.save(buffer, name)
            if buffer.tell():
                found.append((suffix, buffer.getvalue()))
    return found


def _picture(draw: random.Random, mode: str) -> Image.Image:
    rng = np.random.default_rng(draw.getrandbits(32))
    side = draw.choice([(1, 1), (1, 300), (24, 20), (33, 64)])
    colours = Image.fromarray(rng.integers(0, 256, (*side[::-1], 3), dtype=np.uint8))
    if mode == "LAB":
        return Image.fromarray(rng.integers(0, 256, (*side[::-1], 3), dtype=np.uint8), "LAB")
    if mode == "F":
        values = rng.normal(0, 10 ** draw.uniform(-2, 6), side[::-1]).astype(np.float32)
        values[rng.random(side[::-1]) < 0.01] = draw.choice([np.nan, np.inf, 0])
        return Image.fromarray(values)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, side[::-1], dtype=np.uint16))
    return colours.convert("L").convert(mode) if mode in ("LA", "I") else colours.convert(mode)


def broken(draw: random.Random, content: bytes, others: list[tuple[str, bytes]]) -> bytes:
    """Return the bytes of an image with one to three wounds, or as they are."""
    wounded = bytearray(content)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        place = draw.randrange(len(wounded) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            del wounded[place:]
        elif kind == 1:
            wounded[place : place + 4] = draw.randbytes(4)
        elif kind == 2:
            early = draw.randrange(min(64, len(wounded)) + 1)
            wounded[early : early + 4] = draw.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        elif kind == 3:
            wounded[place:place] = draw.choice(others)[1][: draw.randrange(2000)]
        elif kind == 4:
            wounded[place:] = draw.choice(others)[1][place:]
        else:
            for _ in range(draw.randrange(1, 20)):
                if wounded:
                    wounded[draw.randrange(len(wounded))] ^= 1 << draw.randrange(8)
    return bytes(wounded)


def write_tree(root: Path, files: int, seed: int) -> None:
    """Write a source of so many files below class folders, most of them broken."""
    draw = random.Random(seed)
    images = whole_images(draw)
    for label in _CLASSES:
        (root / label / "deep" / "er").mkdir(parents=True)
        (root / label / "loop").symlink_to(root / label)
        (root / label / "gone.png").symlink_to("nowhere")
        os.mkfifo(root / label / "pipe.png")
        for number in range(3):  # enough that no class is left without any
            picture = _picture(draw, "RGB").resize((24, 20))
            picture.save(root / label / f"whole-{number}.png")
    (root / "a class without a file").mkdir()
    for number in range(files):
        suffix, content = draw.choice(images)
        folder = root / draw.choice(_CLASSES) / draw.choice([".", "deep", "deep/er"])
        name = f"{draw.choice(_STEMS)}{number}{draw.choice([suffix, suffix, '.jpg', ''])}"
        (folder / name).write_bytes(broken(draw, content, images))


def accounted(project: Project, source: Path) -> Iterator[str]:
    """Check a raw stage against its source; give what became of each entry."""
    stage = read_stage(project.raw)
    rows = stage.manifest()
    used = Counter(rows["source_id"])
    aside = Counter(item["source_id"] for item in stage.notes["set_aside"])
    assert not (used & aside), "an image is used and set aside"
    assert max((used | aside).values()) == 1, "an image is named twice"
    lies = {
        Path(folder, name).relative_to(source).as_posix()
        for folder, folders, names in os.walk(source)
        for name in [*names, *(f for f in folders if Path(folder, f).is_symlink())]
    }
    named = set(used) | set(aside)
    assert named - lies == {"a class without a file"}, sorted(named - lies)[:5]
    assert not lies - named, sorted(lies - named)[:5]
    for row in rows.itertuples():
        picture = read_rgb(project.raw / row.file_name, 10**9)
        assert picture.size == (row.width, row.height)
        yield "used"
    for item in stage.notes["set_aside"]:
        reason = item["reason"].split(":")[0]
        yield re.sub(
            r"(the same picture as) .*|\d+ x \d+ (px is above .*)", r"\1\2", reason, flags=re.S
        )


def main() -> None:
    """Read the command line, make, materialize twice, check, print."""
    import dagster as dg

    from diffusemix_pipeline.orchestration.launch import prepare_instance

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, project = Path(folder, "source"), Project(Path(folder, "project"))
        project.root.mkdir()
        write_tree(source, options.files, options.seed)
        before = {p: file_sha256(p) for p in sorted(source.rglob("*")) if p.is_file()}
        settings: Settings = load_settings(
            project.root, overrides=[f"source.path={source}", "size=32"], environment={}
        )
        prepare_instance(project)
        with dg.DagsterInstance.get() as instance:
            began = time.monotonic()
            materialize(project, settings, instance, ["raw_dataset"])
            took = time.monotonic() - began
            version = read_stage(project.raw).version
            materialize(project, settings, instance, ["raw_dataset"])
        assert read_stage(project.raw).version == version, "the second time gave other data"
        assert all(file_sha256(path) == sha256 for path, sha256 in before.items())
        found = Counter(accounted(project, source))
        print(
            json.dumps(
                {"files": len(before), "seconds": round(took, 1), **dict(found.most_common())}
            )
        )


if __name__ == "__main__":
    main()
