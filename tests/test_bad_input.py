"""Promise: bad input is set aside by name or refused in one message, as docs/bad_input.md says."""

import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import chdir
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, quick_settings, tiny_editor, write_classes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusemix_pipeline.datasets.images import read_rgb
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.mixing.fractals import fractals_version, load_fractals
from diffusemix_pipeline.orchestration.launch import run_here
from diffusemix_pipeline.preflight import check_run
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings
from diffusemix_pipeline.versioning import ensure_repository

PAGE = (Path(__file__).parent.parent / "docs" / "bad_input.md").read_text("utf-8")
NOBODY = 65534
Make = Callable[[Path], object]


def rows_of(section: str) -> dict[str, tuple[str, str]]:
    """Read a table of the page: what -> what becomes of it, and in which words (a pattern)."""
    found: dict[str, tuple[str, str]] = {}
    words = ""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    for line in text.split("\n|---|---|---|\n")[1].strip().splitlines():
        what, becomes, told = (cell.strip() for cell in line.strip("|").split("|"))
        if not told.startswith("the same"):
            words = re.escape(told.strip("`")).replace("…", ".*") if told.startswith("`") else ""
        found[what] = (becomes, words)
    return found


FILES, FOLDERS, SETTINGS = (
    rows_of("Files in a class folder"),
    rows_of("Folders"),
    rows_of("Prompts and settings"),
)
FRACTALS, DAMAGED = rows_of("Fractals"), rows_of("What lies damaged in a project")


def encoded(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def png(seed: int = 7, size: tuple[int, int] = (24, 20)) -> bytes:
    return encoded(picture(seed, size))


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png_that_says(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def png_with_text(length: int) -> bytes:
    whole = png()
    place = whole.index(b"IDAT") - 4
    return whole[:place] + chunk(b"zTXt", b"x\0\0" + zlib.compress(b"a" * length)) + whole[place:]


def numbers(*values: float) -> bytes:
    return encoded(Image.fromarray(np.resize(np.float32(values), (20, 24))), "TIFF")


def turned() -> bytes:
    exif = picture(7, (24, 20)).getexif()
    exif[0x0112] = 6
    return encoded(picture(7, (24, 20)), "JPEG", exif=exif)


def put(name: str, content: bytes | Callable[[], bytes]) -> Make:
    return lambda source: (source / "cat" / name).write_bytes(
        content if isinstance(content, bytes) else content()
    )


def link(name: str, target: str) -> Make:
    return lambda source: (source / "cat" / name).symlink_to(target)


def link_elsewhere(source: Path) -> None:
    (source.parent / "elsewhere.png").write_bytes(png())
    (source / "cat" / "odd.png").symlink_to(source.parent / "elsewhere.png")


def nested(source: Path) -> None:
    (source / "cat" / "a" / "b").mkdir(parents=True)
    (source / "cat" / "a" / "b" / "odd.png").write_bytes(png())


def twice_across(source: Path) -> None:
    for label in ("cat", "dog"):
        shutil.copytree(source / label, source / "train" / label)
        shutil.rmtree(source / label)
        write_classes(source / "test", [label], 2, seed=700 + ord(label[0]))
    shutil.copyfile(source / "train/cat/0.png", source / "test/cat/odd.png")


def unreadable(source: Path) -> None:
    (source / "cat" / "odd.png").write_bytes(png())
    (source / "cat" / "odd.png").chmod(0)


MAKE_FILE: dict[str, Make] = {
    "cut off": put("odd.jpg", lambda: encoded(picture(7, (200, 200)), "JPEG")[:3000]),
    "cut off in its header": put("odd.png", lambda: png()[:20]),
    "zero bytes": put("odd.jpg", b""),
    "text called .jpg": put("odd.jpg", b"hello"),
    "SVG": put("odd.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "EPS, which is a program": put("odd.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "JPEG called .png": put("odd.png", lambda: encoded(picture(7), "JPEG")),
    "CMYK": put("odd.jpg", lambda: encoded(picture(7).convert("CMYK"), "JPEG")),
    "palette with transparency": put(
        "odd.png", lambda: encoded(picture(7).quantize(16), transparency=0)
    ),
    "16 bits": put(
        "odd.png", lambda: encoded(Image.fromarray(np.full((20, 24), 25700, np.uint16)))
    ),
    "decimal numbers": put("odd.tif", lambda: numbers(0.5)),
    "not a number among its values": put("odd.tif", lambda: numbers(1, np.nan)),
    "infinity among its values": put("odd.tif", lambda: numbers(1, np.inf)),
    "animated": put(
        "odd.gif",
        lambda: encoded(
            Image.new("RGB", (24, 20), "red"),
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", (24, 20), "blue")],
        ),
    ),
    "rotated by EXIF": put("odd.jpg", turned),
    "EXIF that is none": put(
        "odd.jpg", lambda: encoded(picture(7), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    ),
    "1 x 1 px": put("odd.png", lambda: png(7, (1, 1))),
    "1 x 4000 px": put("odd.png", lambda: png(7, (1, 4000))),
    "more pixels than `source.max_pixels`": put("odd.png", lambda: png_that_says(9000, 9000)),
    "more pixels than PIL opens": put("odd.png", lambda: png_that_says(50_000, 50_000)),
    "text of 300 MB in a small PNG": put("odd.png", lambda: png_with_text(300_000_000)),
    "twice in a class and split": lambda source: shutil.copyfile(
        source / "cat" / "0.png", source / "cat" / "odd.png"
    ),
    "in train and test": twice_across,
    "same stem, two suffixes": lambda source: (
        (source / "cat" / "odd.png").write_bytes(png()),
        (source / "cat" / "odd.jpg").write_bytes(encoded(picture(8), "JPEG")),
    ),
    "name with spaces": put("odd one.png", png()),
    "name with quotes": put("odd'\"`$(id).png", png()),
    "name in other scripts": put("odd ünï ☃ 猫.png", png()),
    "name with `..`": put("odd..%2e%2e..png", png()),
    "name with a line break": put("odd\nline.png", png()),
    "name with a leading dash": put("-rf odd.png", png()),
    "name of 250 characters": put("odd" + "x" * 243 + ".png", png()),
    "name that is no UTF-8": put(os.fsdecode(b"odd\xe9.png"), png()),
    "names that differ in case alone": lambda source: (
        (source / "cat" / "odd.png").write_bytes(png()),
        (source / "cat" / "ODD.png").write_bytes(png(8)),
    ),
    "hidden (`.name`)": put(".odd.png", png()),
    "in a folder within the class": nested,
    "link to a file elsewhere": link_elsewhere,
    "link that leads nowhere": link("odd.png", "nowhere"),
    "link to itself": link("odd.png", "odd.png"),
    "link to a device": link("odd.png", "/dev/zero"),
    "link to a folder": link("odd", "/etc"),
    "link to the folder that it lies in": link("odd", "."),
    "pipe": lambda source: os.mkfifo(source / "cat" / "odd.png"),
    "without permission": unreadable,
}
AS_NOBODY = {
    "without permission",
    "class folder that may not be read",
    "source that may not be read",
    "file of `mixing.fractal_dir` without permission",
}
IMAGES = 12


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty folder; where permissions are what is tested, as one who has not all of them."""
    if request.node.callspec.params["what"] not in AS_NOBODY or os.geteuid():
        yield tmp_path
        return
    source = write_classes(tmp_path / "before", ["cat", "dog"], 6)
    ingested(source, tmp_path / "warm")  # what is imported late is imported by now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", None)
        os.seteuid(NOBODY)
        try:
            with tempfile.TemporaryDirectory(dir="/tmp") as theirs:
                yield Path(theirs)
                for path in Path(theirs).rglob("*"):
                    if not path.is_symlink():
                        path.chmod(0o700)
        finally:
            os.seteuid(0)


def ingested(source: Path, folder: Path) -> Stage:
    wanted = quick_settings("source.train_per_class=null", "source.max_pixels=64000000")
    return ingest(str(source), wanted, folder / "raw", aside=folder / "aside")


@pytest.mark.parametrize("what", FILES)
def test_a_file(what: str, folder: Path) -> None:
    becomes, words = FILES[what]
    source = write_classes(folder / "source", ["cat", "dog"], IMAGES // 2)
    MAKE_FILE[what](source)
    odd = {path.name for path in source.rglob("*") if "odd" in path.name.lower()}
    stage = ingested(source, folder)
    aside = [item for item in stage.notes["set_aside"] if "odd" in item["source_id"]]
    rows = stage.manifest()
    used = rows[rows["source_id"].str.lower().str.contains("odd")]
    match becomes:
        case "set aside":
            assert len(used) == 0
            assert len(aside) == len(odd)
            assert all(re.fullmatch(words, item["reason"], re.DOTALL) for item in aside)
        case "used":
            assert not aside
            assert len(used) == len(odd)
            for name in used["file_name"]:
                assert re.fullmatch(r"(train|val|test)/cat/[A-Za-z0-9._-]+\.(png|jpg)", name)
                read_rgb(stage.folder / name, 10**8)
        case "not looked at":
            assert len(used) == len(aside) == 0
        case _:
            pytest.fail(f"the page says {becomes!r}")


PIXELS = {
    "JPEG called .png": lambda: picture(7),
    "16 bits": lambda: Image.new("RGB", (24, 20), (100,) * 3),
    "decimal numbers": lambda: Image.new("RGB", (24, 20), (128,) * 3),
    "animated": lambda: Image.new("RGB", (24, 20), "red"),
    "rotated by EXIF": lambda: picture(7, (24, 20)).rotate(-90, expand=True),
    "EXIF that is none": lambda: picture(7),
    "CMYK": lambda: picture(7),
}


@pytest.mark.parametrize("what", PIXELS)
def test_a_file_shows_what_a_person_would_see(what: str, tmp_path: Path) -> None:
    source = write_classes(tmp_path / "source", ["cat"], 1)
    MAKE_FILE[what](source)
    [odd] = (source / "cat").glob("odd*")
    seen = np.asarray(read_rgb(odd, 10**8)).astype(int)
    assert np.abs(seen - np.asarray(PIXELS[what]()).astype(int)).mean() < 8


def classes(*labels: str, images: int = 6) -> Make:
    return lambda source: write_classes(source, list(labels), images)


def split_folders(train: list[str], test: list[str]) -> Make:
    return lambda source: (
        write_classes(source / "train", train, 6),
        write_classes(source / "test", test, 2, seed=5000),
    )


def with_good_ones(make: Make) -> Make:
    return lambda source: (write_classes(source, ["cat", "dog"], 6), make(source))


def emptied(source: Path) -> None:
    for path in source.rglob("*.png"):
        path.write_bytes(b"")


def beside(source: Path) -> None:
    split_folders(["cat", "dog"], ["cat", "dog"])(source)
    write_classes(source, ["emu"], 2)


def split_beside(source: Path) -> None:
    split_folders(["cat", "dog"], ["cat", "dog"])(source)
    write_classes(source / "dev", ["cat", "dog"], 2, seed=9000)


def one_level_too_high(source: Path) -> None:
    write_classes(source / "animals", ["cat", "dog"], 6)


def capital_splits(source: Path) -> None:
    write_classes(source / "Training", ["cat", "dog"], 6)
    write_classes(source / "Testing", ["cat", "dog"], 2, seed=5000)


def link_to_class(source: Path) -> None:
    (source / "emu").symlink_to(write_classes(source.parent / "other", ["e"], 6, seed=9000) / "e")


SPLIT_NAMES = {"train", "test", "Training", "Testing"}
EVIL = "'\"`$(id) <img src=x onerror=alert(1)> & |"
MAKE_FOLDER: dict[str, Make] = {
    "that is not there": lambda source: None,
    "without anything": lambda source: source.mkdir(),
    "images without class folders": lambda source: (
        source.mkdir(),
        (source / "0.png").write_bytes(png()),
    ),
    "one class": classes("cat"),
    "one level too high": one_level_too_high,
    "`Training` and `Testing`": capital_splits,
    "one image a class": classes("cat", "dog", "emu", images=1),
    "not one image that can be read": with_good_ones(emptied),
    "class folder that may not be read": with_good_ones(lambda source: (source / "cat").chmod(0)),
    "source that may not be read": with_good_ones(lambda source: source.chmod(0)),
    "class in test that train has not": split_folders(["cat", "dog"], ["cat", "emu"]),
    "class names that differ in case alone": classes("cat", "Cat", "dog"),
    "class names that differ in how an accent is written": classes("caf\xe9", "cafe\u0301", "dog"),
    "class name with a line break": classes("cat", "new\nline"),
    "class name that is too long once escaped": classes("cat", os.fsdecode(b"\xe9" * 100)),
    "class name of 250 characters": classes("cat", "x" * 250),
    "class name with a leading dash": classes("cat", "-rf"),
    "class name with quotes, HTML and spaces": classes("cat", EVIL),
    "class missing in test": split_folders(["cat", "dog"], ["cat"]),
    "class of one image": with_good_ones(lambda source: write_classes(source, ["emu"], 1, 9000)),
    "class without a file": with_good_ones(lambda source: (source / "emu").mkdir()),
    "class whose files are none": with_good_ones(
        lambda source: ((source / "emu").mkdir(), (source / "emu" / "0.png").write_bytes(b"no"))
    ),
    "image beside the class folders": with_good_ones(
        lambda source: (source / "0.png").write_bytes(png())
    ),
    "folder beside train and test": beside,
    "folder of class folders beside train and test": split_beside,
    "class folder that is a link": with_good_ones(link_to_class),
    "class folder that is a link to the source": with_good_ones(
        lambda source: (source / "emu").symlink_to(source)
    ),
    "source where the pipeline writes": with_good_ones(lambda source: None),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder(what: str, folder: Path) -> None:
    becomes, words = FOLDERS[what]
    if what == "source where the pipeline writes":
        project = Project(folder)
        source = project.data / "source"
        MAKE_FOLDER[what](source)
        with pytest.raises(UserError, match=words):
            check_run(project, quick_settings(f"source.path={source}"))
        return
    source = folder / "source"
    MAKE_FOLDER[what](source)
    if becomes == "refused":
        with pytest.raises(UserError) as refused:
            ingested(source, folder)
        assert re.fullmatch(words, str(refused.value), re.DOTALL)
        assert not (folder / "raw").exists()
        return
    stage = ingested(source, folder)
    aside = [item["reason"] for item in stage.notes["set_aside"]]
    if becomes == "set aside":
        assert len(aside) == 1
        assert re.fullmatch(words, aside[0])
        assert set(stage.manifest()["label"]) == {"cat", "dog"}
    else:
        assert becomes == "used"
        assert not aside
        labels = {p.name for p in source.rglob("*") if p.is_dir()} - SPLIT_NAMES
        assert set(stage.manifest()["label"]) == labels


YAML: dict[str, bytes] = {
    "no prompt": b"editing: {prompts: []}",
    "empty prompt": b"editing: {prompts: ['  ']}",
    "prompt of 100,000 characters": b"editing: {prompts: [" + b"a" * 100_000 + b"]}",
    "prompt named twice": b"editing: {prompts: [sunset, sunset]}",
    "prompt with a line break": b'editing: {prompts: ["sun\\nset"]}',
    "prompt that is a number": b"editing: {prompts: [1]}",
    "prompt with slashes and HTML": b"editing: {prompts: ['../<script>alert(1)</script>']}",
    "unknown key": b"editing: {stepz: 3}",
    "key set twice": b"size: 64\nsize: 32",
    "wrong type": b"size: big",
    "section that is a list": b"editing: []",
    "number that is none": b"mixing: {lam: .nan}",
    "YAML tag that calls Python": b"size: !!python/object/apply:os.mkdir ['called']",
    "broken YAML": b"size: [1",
    "YAML nested without end": b"size: " + b"[" * 100_000,
    "YAML whose aliases multiply": b"size: [&a0 [x, x]"
    + b"".join(b", &a%d [%s]" % (n, b"*a%d, " % (n - 1) * 9) for n in range(1, 12))
    + b"]",
    "no UTF-8": b"source: {path: caf\xe9}",
    "a list of settings": b"- size",
    "empty file": b"",
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_settings_file(what: str, tmp_path: Path) -> None:
    becomes, words = SETTINGS[what]
    path = tmp_path / "diffusemix.yaml"
    if what == "a folder":
        path.mkdir()
    else:
        path.write_bytes(YAML[what])
    with chdir(tmp_path):
        if becomes == "used":
            load_settings(tmp_path, environment={})
            return
        with pytest.raises(UserError) as refused:
            load_settings(tmp_path, environment={})
    assert becomes == "refused"
    assert re.fullmatch(words, str(refused.value), re.DOTALL)
    assert len(str(refused.value)) < 1000
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("what", FRACTALS)
def test_fractals(what: str, folder: Path) -> None:
    becomes, words = FRACTALS[what]
    fractals, cache = folder / "fractals", folder / "cache"
    asked = quick_settings(f"mixing.fractal_dir={fractals}").mixing
    if what == "made fractal that is damaged":
        made = quick_settings("mixing.fractal_count=2").mixing
        before = load_fractals(made, 0, 32, cache, silent)
        for path in cache.rglob("*.png"):
            path.write_bytes(path.read_bytes()[:40])
        after = load_fractals(made, 0, 32, cache, silent)
        assert becomes == "made anew"
        assert all(np.array_equal(before[name], after[name]) for name in before)
        return
    if "is not there" not in what:
        fractals.mkdir()
    if "broken" in what or "permission" in what:
        (fractals / "broken.png").write_bytes(b"no")
    if "permission" in what:
        (fractals / "broken.png").chmod(0)
    if "among them" in what:
        (fractals / "whole.png").write_bytes(png())
        with pytest.warns(UserWarning, match=words):
            assert set(load_fractals(asked, 0, 32, cache, silent)) == {"whole.png"}
        return
    assert becomes == "refused"
    with pytest.raises(UserError) as refused:
        fractals_version(asked, 0)
        load_fractals(asked, 0, 32, cache, silent)
    assert re.fullmatch(words, str(refused.value), re.DOTALL)


# Trees of all that -------------------------------------------------------------------------------

CONTENTS = {
    "whole": lambda seed: png(seed),
    "wounded": lambda seed: png(seed)[: 20 + seed % 80],
    "empty": lambda seed: b"",
    "animated": lambda seed: encoded(
        picture(seed), "GIF", save_all=True, append_images=[picture(seed + 1)]
    ),
    "decimal": lambda seed: numbers(seed % 7, [np.nan, 300.5][seed % 2]),
    "other": lambda seed: encoded(picture(seed % 5).convert("CMYK"), "JPEG"),
}
NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda name: name not in (".", ".."))
FOUND = st.tuples(
    st.sampled_from(["cat", "dog", "emu"]),
    st.lists(NAMES, max_size=2),
    NAMES,
    st.sampled_from([*CONTENTS, "link", "folder", "pipe"]),
    st.integers(0, 40),
)


def write_found(source: Path, found: list[tuple[str, list[str], str, str, int]]) -> None:
    for label, folders, name, kind, seed in found:
        path = source.joinpath(label, *folders, name)
        if path.exists() or path.is_symlink() or any(p.is_file() for p in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "link":
            path.symlink_to(["0.png", ".", "nowhere", "../dog"][seed % 4])
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(CONTENTS[kind](seed))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(found=st.lists(FOUND, max_size=12), in_splits=st.booleans())
def test_whatever_lies_in_a_source_is_used_or_set_aside_and_never_both(found, in_splits) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        home = source / "train" if in_splits else source
        write_classes(home, ["cat", "dog"], 4, seed=5000)
        write_found(home, found)
        before = snapshot(source)
        stage = ingested(source, Path(folder))
        rows = stage.manifest()
        used = list(rows["source_id"])
        aside = [item["source_id"] for item in stage.notes["set_aside"]]
        named = [*used, *aside]
        assert len(set(named)) == len(named)
        assert set(named) >= {name for name in before if visible(name) and in_class(name, home)}
        assert set(rows["label"]) <= {"cat", "dog", "emu"}
        for row in rows.itertuples():
            inside = (stage.folder / row.file_name).resolve()
            assert inside.is_relative_to((stage.folder / row.split / row.label).resolve())
            assert read_rgb(inside, 10**8).size == (row.width, row.height)
        assert snapshot(source) == before, "a source is only read"
        assert ingested(source, Path(folder)).version == stage.version


def snapshot(source: Path) -> dict[str, str]:
    """Return what lies in a folder: of a file its digest, of a link where it leads."""
    found = {}
    for folder, folders, names in os.walk(source):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for path in (Path(folder, name) for name in [*names, *links]):
            name = path.relative_to(source).as_posix()
            if path.is_symlink():
                found[name] = str(path.readlink())
            else:
                content = path.read_bytes() if path.is_file() else b"pipe"
                found[name] = hashlib.sha256(content).hexdigest()
    return found


def visible(name: str) -> bool:
    return not any(part.startswith(".") for part in Path(name).parts)


def in_class(name: str, home: Path) -> bool:
    return len(Path(name).parts) > (2 if home.name == "train" else 1)


# What lies damaged in a project ------------------------------------------------------------------


def cut(root: Path, pattern: str) -> None:
    """Leave the first half of each file: by a new one, as links share the bytes of the old."""
    found = sorted(root.glob(pattern))
    assert found, pattern
    for path in found:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[: len(content) // 2])


def overwrite(root: Path, pattern: str) -> None:
    found = sorted(path for path in root.glob(pattern) if path.is_file())
    assert found, pattern
    for path in found:
        path.unlink()
        path.write_bytes(b"\x93junk\xff" * 10)


def leave_locks(root: Path) -> None:
    (root / ".dvc" / "tmp").mkdir(exist_ok=True)
    (root / ".dvc" / "tmp" / "lock").write_text("     999999\n")


DAMAGE: dict[str, Make] = {
    "`data/raw/manifest.parquet`": lambda root: cut(root, "data/raw/manifest.parquet"),
    "`data/generated/manifest.parquet`": lambda root: cut(root, "data/generated/manifest.parquet"),
    "`data/hybrid/manifest.parquet`": lambda root: cut(root, "data/hybrid/manifest.parquet"),
    "`data/augmented/manifest.parquet`": lambda root: cut(root, "data/augmented/manifest.parquet"),
    "`data/raw/stage.json`": lambda root: overwrite(root, "data/raw/stage.json"),
    "`data/augmented/stage.json`": lambda root: cut(root, "data/augmented/stage.json"),
    "`data/raw/checked.parquet`": lambda root: cut(root, "data/raw/checked.parquet"),
    "image of `data/generated`": lambda root: cut(root, "data/generated/*/*.png"),
    "image of `data/augmented`": lambda root: overwrite(root, "data/augmented/*/*.png"),
    "edit in the store": lambda root: cut(root, ".diffusemix/edits/[0-9a-f][0-9a-f]/*.png"),
    "record of edits": lambda root: overwrite(root, ".diffusemix/edits/records/*.jsonl"),
    "verdict of the label gate": lambda root: overwrite(root, ".diffusemix/gate/**/*.jsonl"),
    "`model.safetensors` of a checkpoint": lambda root: cut(
        root, ".diffusemix/checkpoints/*/model.safetensors"
    ),
    "`fit.json` of a checkpoint": lambda root: overwrite(
        root, ".diffusemix/checkpoints/*/fit.json"
    ),
    "`evidence.npz`": lambda root: overwrite(root, ".diffusemix/evidence/*/evidence.npz"),
    "`test_reads.json`": lambda root: cut(root, ".diffusemix/test_reads.json"),
    "`report.json`": lambda root: cut(root, "outputs/report/report.json"),
    "`data.dvc`": lambda root: cut(root, "data.dvc"),
    "`.dvc/config`": lambda root: overwrite(root, ".dvc/config"),
    "lock of a DVC that was killed": leave_locks,
    "lock of a run that was killed": lambda root: overwrite(root, ".diffusemix/run.lock"),
    "`dropped.txt`": lambda root: (root / "dropped.txt").write_bytes(b"\xff\xfe"),
    "MLflow's database": lambda root: overwrite(root, ".diffusemix/mlflow.db"),
    "Dagster's databases": lambda root: cut(root, ".diffusemix/dagster/storage/**/*.db"),
}
# Of each group, no damage hides another.
TOGETHER = [
    ["`data/raw/manifest.parquet`", "`data/hybrid/manifest.parquet`", "record of edits"],
    ["`data/raw/stage.json`", "`data/generated/manifest.parquet`", "`dropped.txt`"],
    ["`data/raw/checked.parquet`", "image of `data/generated`", "`data/augmented/stage.json`"],
    ["image of `data/augmented`", "`data.dvc`", "`fit.json` of a checkpoint"],
    ["edit in the store", "verdict of the label gate", "`data/augmented/manifest.parquet`"],
    ["`model.safetensors` of a checkpoint", "`evidence.npz`", "`test_reads.json`"],
    ["lock of a DVC that was killed", "`report.json`", "lock of a run that was killed"],
    ["`.dvc/config`", "MLflow's database", "Dagster's databases"],
]


def test_every_row_is_tested() -> None:
    assert FILES.keys() == MAKE_FILE.keys()
    assert FOLDERS.keys() == MAKE_FOLDER.keys()
    assert SETTINGS.keys() == YAML.keys() | {"a folder"}
    assert DAMAGED.keys() == DAMAGE.keys()
    assert sorted(chain.from_iterable(TOGETHER)) == sorted(DAMAGED)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    editor = tiny_editor(tmp_path_factory.mktemp("editor"))
    # Teachers of few steps know nothing, but let some edits through.
    gate = ["enabled=true", "folds=2", "max_change=1", "false_reject_rate=0.25"]
    return [f"editing.editor={editor}", *(f"editing.gate.{of}" for of in gate)]


@pytest.fixture(scope="module")
def wanted(overrides) -> Settings:
    return quick_settings(*overrides)


@pytest.fixture(scope="module")
def whole(wanted, tmp_path_factory) -> Path:
    """A project after a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    assert run_here(Project(root), wanted, silent).success
    return root


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_used_goes_through_the_whole_pipeline(overrides, tmp_path):
    source, project = tmp_path / "source", Project(tmp_path / "project")
    project.root.mkdir()
    labels = {"cat", "-rf", EVIL, "x" * 250}
    write_classes(source, sorted(labels), 6)
    used = [what for what, (becomes, _) in FILES.items() if becomes == "used"]
    for number, what in enumerate(used):
        if what != "in train and test":
            MAKE_FILE[what](source)
            for odd in (source / "cat").glob("[oO][dD][dD]*"):
                odd.rename(odd.with_name(f"{number}{odd.name}"))
    prompts = ["../a/b", "<script>alert(1)</script> | `x` ${y} {z}"]
    own = [f"source.path={source}", f"editing.prompts={json.dumps(prompts)}"]
    outcome = run_here(project, quick_settings(*overrides, *own), silent)
    assert outcome.success, outcome.problems
    report = json.loads((project.report / "report.json").read_text("utf-8"))
    assert set(report["data"]["classes"]) == labels
    assert {path.parent.name for path in project.augmented.rglob("*.png")} == labels


def results(root: Path) -> dict[str, str]:
    """Return digests of data, of what was learnt and of what is reported."""
    project = Project(root)
    files = [*project.data.rglob("*"), *project.checkpoints.rglob("*.safetensors")]
    files += [root / "data.dvc", project.report / "report.json"]
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }


def do_what_it_says(message: str) -> None:
    """Remove what a message names, or else begins with."""
    named = re.search(r"(?:Remove|Delete) (/\S+) and run", message)
    path = Path(named[1] if named else message.split(" is ")[0])
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def refusal(root: Path, wanted: Settings) -> str:
    """Run a project; return what a person is told, or nothing where the run ended well."""
    try:
        outcome = run_here(Project(root), wanted, silent)
    except UserError as refused:
        return str(refused)
    if outcome.success:
        return ""
    assert outcome.user_error, outcome.problems
    [message] = outcome.problems
    return message


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("damaged", TOGETHER, ids=lambda names: names[0])
def test_what_is_damaged_is_made_anew_or_named_with_the_repair(damaged, wanted, whole, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(whole, root, symlinks=True)
    for what in damaged:
        DAMAGE[what](root)
    told = []
    while message := refusal(root, wanted):
        assert message not in told, "what it says does not help"
        told.append(message)
        do_what_it_says(message)
    refused = [DAMAGED[what][1] for what in damaged if DAMAGED[what][0] == "refused"]
    for words in refused:
        assert any(re.fullmatch(words, message, re.DOTALL) for message in told), (words, told)
    assert results(root) == results(whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("comes_from", ["its source", "a DVC remote"])
def test_damage_in_place_is_mended_by_what_it_says(comes_from, overrides, tmp_path):
    """Every file of `data/` and, by their links, those of DVC's cache and of the edit store."""
    source, project = write_classes(tmp_path / "source", ["cat", "dog"], 6), Project(tmp_path / "p")
    project.root.mkdir()
    wanted = quick_settings(*overrides, f"source.path={source}")
    if comes_from == "a DVC remote":
        ensure_repository(project.root)
        remote = ["remote", "add", "--quiet", "--default", "store", str(tmp_path / "remote")]
        subprocess.run([sys.executable, "-m", "dvc", *remote], cwd=project.root, check=True)
    assert run_here(project, wanted, silent).success
    whole = results(project.root)
    if comes_from == "a DVC remote":
        shutil.rmtree(source)
        wanted = quick_settings(*overrides, "source.path=''")
    for path in project.data.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            with path.open("r+b") as file:
                file.write(b"\x93junk\xff")
            path.chmod(0o444)
    told = []
    while message := refusal(project.root, wanted):
        assert message not in told, "what it says does not help"
        told.append(message)
        do_what_it_says(message)
    assert told
    made = results(project.root)
    for of_settings in (whole, made):  # where images come from is told in it
        del of_settings["outputs/report/report.json"]
    assert made == whole
