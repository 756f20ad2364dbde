"""Promise: a user's images are only read, bad ones are set aside by name, splits never mix."""

import os
import pickle
import subprocess
from contextlib import chdir
from pathlib import Path

import numpy as np
import pandas as pd
import pandera.errors
import pyarrow as pa
import pytest
from conftest import picture, quick_settings, write_classes, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from diffusemix_pipeline.datasets import items
from diffusemix_pipeline.datasets.checked import Checked, Facts, told
from diffusemix_pipeline.datasets.columns import first_alike, places_in, rows_digest
from diffusemix_pipeline.datasets.copies import copies_across_splits
from diffusemix_pipeline.datasets.images import (
    UnreadableImageError,
    read_rgb,
    read_square,
    to_square,
)
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.manifest import (
    MANIFEST,
    TablesWriter,
    part_table,
    read_manifest,
    read_stage,
    rows_version,
    typed,
)
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import Ledger
from diffusemix_pipeline.identity import file_sha256

PIXELS = 10_000_000


def ingested(source: Path | str, out: Path, *overrides: str, **how):
    settings = quick_settings("source.train_per_class=null", *overrides)
    return ingest(str(source), settings, out / "raw", aside=out / "aside", **how)


def snapshot_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


# Reading


def test_exif_rotation_is_applied(tmp_path):
    upright = picture(1, (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown after a quarter turn clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(
        np.asarray(read_rgb(tmp_path / "turned.png", PIXELS)), np.asarray(upright)
    )


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),  # transparent shows the white below
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", (50, 255), (50, 50, 50)),
    ],
)
def test_every_mode_becomes_rgb(mode, value, expected, tmp_path):
    path = tmp_path / ("image.tif" if mode in ("CMYK", "I;16") else "image.png")
    Image.new(mode, (8, 8), value).save(path)
    pixels = np.asarray(read_rgb(path, PIXELS))
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels[4, 4].astype(int) - expected).max() <= 1


def test_a_palette_with_transparency_lies_on_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "palette.png", transparency=0)
    assert read_rgb(tmp_path / "palette.png", PIXELS).getpixel((4, 4)) == (255, 255, 255)


def test_an_image_above_the_pixel_limit_is_refused_unread(tmp_path):
    picture(1, (100, 50)).save(tmp_path / "large.png")
    with pytest.raises(UnreadableImageError, match="100 x 50 px is above 4999 px"):
        read_rgb(tmp_path / "large.png", 4999)


def test_the_square_is_the_centre_of_the_image():
    image = Image.new("RGB", (90, 30), "black")
    image.paste("white", (30, 0, 60, 30))
    assert (to_square(image, 30) == 255).all()


# The stage


def test_the_digits_are_split_without_overlap(tmp_path):
    stage = ingested("digits", tmp_path, "source.val_fraction=0.3", "source.test_fraction=0.4")
    rows = stage.manifest()
    assert len(rows) == 1797
    assert rows.groupby("split")["source_sha256"].nunique().sum() == rows["source_sha256"].nunique()
    assert rows["label"].nunique() == 10
    assert set(rows[["width", "height"]].stack()) == {32}
    assert stage.notes["set_aside"] == []


def test_few_shot_thins_train_alone(tmp_path):
    whole = ingested("digits", tmp_path / "a").counts["by_split"]
    few = ingested("digits", tmp_path / "b", "source.train_per_class=5").counts["by_split"]
    assert set(few["train"].values()) == {5}
    assert few["test"] == whole["test"]
    assert few["val"] == whole["val"]


def test_a_folder_with_splits_keeps_them_and_gets_a_val(tmp_path):
    write_classes(tmp_path / "data" / "train", ["cat", "dog"], 8)
    write_classes(tmp_path / "data" / "test", ["cat", "dog"], 3, seed=500)
    stage = ingested(tmp_path / "data", tmp_path, "source.val_fraction=0.25")
    counts = stage.counts["by_split"]
    assert counts["test"] == {"cat": 3, "dog": 3}
    for label in ("cat", "dog"):
        assert counts["train"][label] + counts["val"][label] == 8
        assert 1 <= counts["val"][label] <= 6


def test_new_images_move_no_old_one_between_splits(tmp_path):
    shares = ("source.val_fraction=0.3", "source.test_fraction=0.3")
    source = write_classes(tmp_path / "data", ["cat", "dog"], 20)
    before = (
        ingested(source, tmp_path / "a", *shares).manifest().set_index("source_sha256")["split"]
    )
    write_classes(source, ["cat", "dog"], 30)
    after = ingested(source, tmp_path / "b", *shares).manifest().set_index("source_sha256")["split"]
    assert len(after) == 60
    assert after.loc[before.index].equals(before)


def test_about_the_stated_share_is_held_out(tmp_path):
    stage = ingested("digits", tmp_path, "source.val_fraction=0.3", "source.test_fraction=0.4")
    shares = stage.manifest()["split"].value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.4, abs=0.03)
    assert shares["val"] == pytest.approx(0.6 * 0.3, abs=0.03)


def test_a_class_keeps_its_last_training_image(tmp_path):
    for images in (3, 4, 5):
        source = write_classes(tmp_path / f"data{images}", [f"c{n}" for n in range(12)], images)
        by_split = ingested(source, tmp_path / str(images)).counts["by_split"]
        assert len(by_split["train"]) == 12
        assert sum(by_split["test"].values()) >= 12


def test_too_few_images_to_hold_any_out_are_refused(tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 2)
    with pytest.raises(UserError, match="no images for val: .* no class has one to spare"):
        ingested(source, tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    source = write_classes(tmp_path / "data", ["train", "bus"], 6)
    counts = ingested(source, tmp_path).counts["by_split"]
    assert set(counts["train"]) == {"train", "bus"}
    write_classes(tmp_path / "split" / "train", ["train", "bus"], 6)
    write_classes(tmp_path / "split" / "test", ["train", "bus"], 2, seed=50)
    counts = ingested(tmp_path / "split", tmp_path / "b").counts["by_split"]
    assert counts["test"] == {"train": 2, "bus": 2}


def test_few_shot_holds_where_all_is_train(tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 6)
    stage = ingested(source, tmp_path, "source.train_per_class=4", train_only=True)
    assert stage.counts["by_split"] == {"train": {"cat": 4, "dog": 4}}
    assert stage.notes["left_out_by_train_per_class"] == 4


def test_a_source_is_only_read_and_its_plain_bytes_are_kept(tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 6)
    picture(77).save(source / "cat" / "photo.jpg", quality=90)
    before = snapshot_of(source)
    stage = ingested(source, tmp_path)
    assert snapshot_of(source) == before
    rows = stage.manifest().set_index("source_id")
    copied = stage.folder / rows.loc["cat/photo.jpg", "file_name"]
    assert copied.read_bytes() == before["cat/photo.jpg"][0]
    assert copied.stat().st_ino != (source / "cat/photo.jpg").stat().st_ino


def test_the_split_does_not_depend_on_names_or_order(tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 10)
    before = ingested(source, tmp_path / "a").manifest()
    for path in sorted(source.rglob("*.png")):
        path.rename(path.with_name(f"renamed-{9 - int(path.stem)}.png"))
    after = ingested(source, tmp_path / "b").manifest()
    columns = ["label", "split", "source_sha256"]
    assert sorted(before[columns].itertuples(index=False)) == sorted(
        after[columns].itertuples(index=False)
    )


def test_bad_files_are_set_aside_by_name_and_end_nothing(tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 6)
    (source / "cat" / "empty.png").write_bytes(b"")
    (source / "cat" / "text.jpg").write_text("no image")
    (source / "dog" / "photo.heic").write_bytes(b"a format that PIL does not read")
    (source / "dog" / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    whole = (source / "cat" / "0.png").read_bytes()
    (source / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (source / "cat" / "again.png").write_bytes((source / "cat" / "1.png").read_bytes())
    stage = ingested(source, tmp_path)
    reasons = {item["source_id"]: item["reason"] for item in stage.notes["set_aside"]}
    assert set(reasons) == {
        *("cat/empty.png", "cat/text.jpg", "cat/again.png"),
        *("dog/cut.png", "dog/photo.heic", "dog/program.eps"),
    }
    assert reasons["cat/again.png"] == "the same picture as cat/1.png"
    assert stage.counts["images"] == 12
    assert str(tmp_path) not in str(reasons)


def test_files_that_could_not_be_read_when_listed_are_not_taken_for_each_other(
    tmp_path, monkeypatch
):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 6)
    lost = ("1.png", "2.png")

    def sometimes(path):
        if path.name in lost:
            raise OSError("the server is gone for a moment")
        return file_sha256(path)

    monkeypatch.setattr(items, "file_sha256", sometimes)
    for _ in range(2):
        stage = ingested(source, tmp_path)
        reasons = {item["source_id"]: item["reason"] for item in stage.notes["set_aside"]}
        assert reasons.keys() == {f"{label}/{name}" for label in ("cat", "dog") for name in lost}
        assert set(reasons.values()) == {"it could not be read when it was listed"}
        lost = (*lost, "3.png")
    monkeypatch.undo()
    assert ingested(source, tmp_path).counts["images"] == 12


def test_a_training_copy_of_a_test_image_is_told(tmp_path):
    write_classes(tmp_path / "data" / "train", ["cat", "dog"], 8)
    write_classes(tmp_path / "data" / "test", ["cat", "dog"], 3, seed=500)
    leaked = Image.open(tmp_path / "data" / "test" / "cat" / "0.png")
    leaked.save(tmp_path / "data" / "train" / "cat" / "leak.bmp")  # other bytes, the same picture
    stage = ingested(tmp_path / "data", tmp_path, "source.val_fraction=0.1")
    split = stage.manifest().set_index("source_id").loc["train/cat/leak.bmp", "split"]
    told = {"split": split, "image": "train/cat/leak.bmp", "held_out": "test/cat/0.png"}
    assert stage.notes["copies_across_splits"] == [told]


@pytest.mark.parametrize(
    "again",
    [
        lambda image, path: image.save(path, quality=60),
        lambda image, path: image.resize((20, 16), Image.Resampling.LANCZOS).save(path),
        lambda image, path: image.point(lambda value: value * 0.9).save(path, quality=90),
    ],
)
def test_a_picture_that_was_saved_anew_in_another_split_is_told(again, tmp_path):
    write_classes(tmp_path / "data" / "train", ["cat", "dog"], 8)
    write_classes(tmp_path / "data" / "test", ["cat", "dog"], 3, seed=500)
    again(Image.open(tmp_path / "data/test/cat/0.png"), tmp_path / "data/train/dog/leak.jpg")
    Image.new("RGB", (9, 9), "white").save(tmp_path / "data/train/dog/flat.png")
    Image.new("RGB", (9, 9), "black").save(tmp_path / "data/test/dog/flat.png")
    stage = ingested(tmp_path / "data", tmp_path, "source.val_fraction=0.1")
    [told] = stage.notes["copies_across_splits"]
    assert (told["image"], told["held_out"]) == ("train/dog/leak.jpg", "test/cat/0.png")


def test_no_two_digits_are_taken_for_copies(tmp_path):
    settings = quick_settings("source.train_per_class=null", "source.test_fraction=0.3")
    stage = ingest("digits", settings, tmp_path / "raw", aside=tmp_path / "aside")
    assert stage.notes["copies_across_splits"] == []


def radiograph(rng: np.random.Generator) -> Image.Image:
    """Make a picture that shares most of what it shows with all others, but for its lesion."""
    y, x = np.mgrid[:96, :96] / 96
    pixels = rng.normal(40, 8, (96, 96))
    for centre in (0.3, 0.7):
        pixels += 120 * np.exp(-((x - centre) ** 2 / 0.03 + (y - 0.5) ** 2 / 0.12))
    where, radius = rng.uniform(0.2, 0.8, 2), rng.uniform(0.04, 0.08)
    pixels += 50 * np.exp(-((x - where[0]) ** 2 + (y - where[1]) ** 2) / (2 * radius**2))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")


def test_pictures_of_one_make_are_no_copies_but_their_copies_are(tmp_path):
    rng = np.random.default_rng(0)
    for split, images in (("train", 40), ("test", 20)):
        for label in ("ill", "well"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(images):
                radiograph(rng).save(folder / f"{number}.png")
    again = Image.open(tmp_path / "data/test/ill/7.png")
    again.save(tmp_path / "data/train/ill/again.jpg", quality=90)
    told = ingested(tmp_path / "data", tmp_path).notes["copies_across_splits"]
    assert [(copy["image"], copy["held_out"]) for copy in told] == [
        ("train/ill/again.jpg", "test/ill/7.png")
    ]


@pytest.mark.parametrize("seed", range(3))
def test_among_many_pictures_every_near_copy_is_told_and_nothing_else(seed, tmp_path):
    rng = np.random.default_rng(seed)
    held_out = rng.normal(120, 40, (3000, 64))
    held_out[:1500] += np.linspace(-60, 60, 64)  # pictures differ along one line above all
    ours = rng.normal(120, 40, (5000, 64))
    copied = rng.permutation(3000)[:400]
    ours[rng.permutation(5000)[:400]] = held_out[copied] * 0.9 + np.linspace(-4, 4, 64)
    outlines = np.concatenate([ours, held_out]).astype(np.float16)
    rows = outlines.astype(np.float64)
    rows -= rows.mean(axis=1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    correlation = rows[:5000] @ rows[5000:].T
    near = {(f"a{ours}", f"b{theirs}") for ours, theirs in np.argwhere(correlation > 0.997)}
    assert len(near) > 300  # as far apart on the line as near-copies can be, and some further

    digests = [f"{number:064x}" for number in range(8000)]
    facts = {
        sha256: Facts(sha256, outline.tobytes(), 8, 8)
        for sha256, outline in zip(digests, outlines, strict=True)
    }
    images = pd.DataFrame(
        {
            "source_id": [f"a{number}" for number in range(5000)]
            + [f"b{number}" for number in range(3000)],
            "split": ["train"] * 5000 + ["test"] * 3000,
            "sha256": digests,
            "pixels": digests,
        }
    )
    checked = Checked(told(facts, 0, Ledger(tmp_path / "begun")))
    found = copies_across_splits(images, checked)
    assert {(copy["image"], copy["held_out"]) for copy in found} == near


def test_pickles_among_the_images_are_set_aside_unread(tmp_path, trap):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 6)
    names = ["cat/evil.png", "cat/evil.pt", "dog/evil.npy"]
    for name in names:
        (source / name).write_bytes(pickle.dumps(trap))
    stage = ingested(source, tmp_path)
    assert [item["source_id"] for item in stage.notes["set_aside"]] == names


def test_names_that_are_no_text_are_escaped(tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 6)
    first = source / "cat" / "0.png"
    first.rename(first.with_name(os.fsdecode(b"caf\xe9.png")))
    stage = ingested(source, tmp_path)
    assert r"cat/caf\xe9.png" in set(stage.manifest()["source_id"])
    assert stage.counts["images"] == 12


def test_hidden_folders_are_passed_over(tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 6)
    write_classes(source / "cat" / ".thumbnails", ["small"], 3, seed=70)
    write_classes(source / "cat", ["kittens"], 3, seed=80)  # a folder within a class is the class's
    assert ingested(source, tmp_path).counts["images"] == 15


def test_unchanged_content_is_not_written_again(tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 6)
    first = ingested(source, tmp_path)
    before = snapshot_of(first.folder)
    for path in source.rglob("*.png"):
        path.touch()  # a new time is no new content
    again = ingested(source, tmp_path)
    assert again.reused
    assert snapshot_of(again.folder) == before
    picture(99).save(source / "cat" / "new.png")
    changed = ingested(source, tmp_path)
    assert not changed.reused
    assert changed.version != first.version


def test_a_missing_file_makes_the_stage_again(tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 6)
    first = ingested(source, tmp_path)
    (first.folder / first.manifest()["file_name"][0]).unlink()
    again = ingested(source, tmp_path)
    assert not again.reused
    assert again.version == first.version


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "holds no images in class folders"),
        (lambda root: write_classes(root, ["cat"], 6), "all of one class, cat"),
        (
            lambda root: (
                write_classes(root / "train", ["cat", "dog"], 6),
                write_classes(root / "test", ["cat", "emu"], 2),
            ),
            "no training images: emu",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_by_name(make, message, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        ingested(tmp_path / "data", tmp_path)


def test_train_only_holds_nothing_out_and_refuses_split_folders(tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 4)
    stage = ingested(source, tmp_path, train_only=True)
    assert stage.counts["by_split"] == {"train": {"cat": 4, "dog": 4}}
    write_classes(tmp_path / "split" / "train", ["cat", "dog"], 4)
    with pytest.raises(UserError, match="give the train folder alone"):
        ingested(tmp_path / "split", tmp_path, train_only=True)


# Columns

TEXTS = st.lists(st.text("ab", max_size=2), max_size=9)


@given(TEXTS, TEXTS)
def test_places_are_those_of_the_first_equal_text(known, values):
    column = pa.chunked_array([known[:3], known[3:]], pa.string())
    expected = [known.index(value) if value in known else -1 for value in values]
    assert list(places_in(column, pd.Series(values, dtype="str"))) == expected


@given(
    st.lists(st.tuples(st.none() | st.sampled_from("ab"), st.text("ab", min_size=1, max_size=2)))
)
def test_rows_are_alike_where_all_texts_are(rows):
    columns = [pd.Series([row[of] for row in rows], dtype="str") for of in (0, 1)]
    assert list(first_alike(*columns)) == [rows.index(row) for row in rows]


# The manifest


ROW = {
    "image_id": "a",
    "file_name": "a.png",
    "label": "cat",
    "split": "train",
    "source_id": "s",
    "source_sha256": "0",
    "sha256": "0",
}


def write_manifest(parts: dict[str, list[dict[str, object]]], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tables = TablesWriter(folder)
    for name, rows in parts.items():
        tables.add(name, f"of {name}", part_table(rows), None)
    tables.close({"stage": "x", "fingerprint": "y", "notes": {}, "layout": {}})


@pytest.mark.parametrize("wrong", [{"split": "holdout"}, {"label": None}, {"label": ".."}])
def test_a_manifest_refuses_rows_that_make_no_sense(wrong, tmp_path):
    write_manifest({"train-0": [ROW]}, tmp_path)
    assert len(read_manifest(tmp_path)) == 1
    with pytest.raises(Exception, match=next(iter(wrong))):
        write_manifest({"train-0": [{**ROW, **wrong}]}, tmp_path)


def test_a_manifest_refuses_the_same_image_twice(tmp_path):
    with pytest.raises(Exception, match="image_id"):
        write_manifest({"train-0": [ROW, ROW]}, tmp_path / "part")
    write_manifest({"train-0": [ROW], "train-1": [ROW]}, tmp_path / "parts")
    with pytest.raises(Exception, match="image_id"):
        read_manifest(tmp_path / "parts")


VALUES = {
    "file_name": st.text(min_size=1),
    "prompt": st.none() | st.text(),
    "lam": st.none() | st.floats(0, 1),
    "seed": st.none() | st.integers(0, 2**63 - 1),
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.fixed_dictionaries(VALUES), min_size=2, max_size=9), st.data())
def test_the_version_is_that_of_all_values_however_they_are_ordered_and_parted(rows, data):
    rows = [{**ROW, "image_id": str(number), **row} for number, row in enumerate(rows)]

    def version(rows):
        return rows_version(pa.Table.from_pandas(typed(rows), preserve_index=False))

    whole = version(rows)
    assert version(data.draw(st.permutations(rows))) == whole
    cut = data.draw(st.integers(1, len(rows) - 1))
    parts = int(version(rows[:cut]), 16) + int(version(rows[cut:]), 16)
    assert f"{parts % 2**128:032x}" == whole
    changed, name = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.sampled_from([*VALUES]))
    other = data.draw(VALUES[name].filter(lambda value: value != rows[changed][name]))
    rows[changed][name] = other
    assert version(rows) != whole


def test_a_part_of_a_manifest_is_read_by_itself(tmp_path):
    parts = {
        f"train-{part}": [
            {**ROW, "image_id": f"{n}", "file_name": f"{n} \u00fc, \U0001f642\n.png"}
            for n in range(part, 9, 3)
        ]
        for part in range(3)
    }
    write_manifest(parts, tmp_path)
    stage = read_stage(tmp_path)
    assert stage.counts == {"images": 9, "by_split": {"train": {"cat": 9}}}
    assert list(stage.manifest()["image_id"]) == [f"{n}" for n in range(9)]
    for name, rows in parts.items():
        assert stage.rows_of(name).equals(typed(rows))
        assert list(stage.rows_of(name, ["image_id"])["image_id"]) == [r["image_id"] for r in rows]
        assert stage.parts[name].images == 3
        assert stage.parts[name].version == rows_version(part_table(rows))


def test_a_folder_without_a_stage_is_named(tmp_path):
    with pytest.raises(UserError, match="run the stage"):
        read_stage(tmp_path)
    with pytest.raises(UserError, match="run the stage"):
        read_manifest(tmp_path)


def test_an_image_of_the_pipeline_reads_back_as_it_was_written(tmp_path):
    stage = ingested(write_classes(tmp_path / "data", ["cat", "dog"], 6), tmp_path)
    name = stage.manifest()["file_name"][0]
    assert read_square(stage.folder / name, 32).shape == (32, 32, 3)


def test_no_program_is_read_as_an_image_of_the_pipeline(tmp_path):
    picture(0).save(tmp_path / "cat.eps")
    with pytest.raises(UnidentifiedImageError):
        read_square((tmp_path / "cat.eps").rename(tmp_path / "cat.png"), 32)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("file_name", "../cat.png"),
        ("file_name", "a/../../cat.png"),
        ("file_name", "/etc/cat.png"),
        ("edit_key", "../" + "0" * 29),
        ("edit_key", "cat"),
        ("label", "../cat"),
        ("label", ".."),
    ],
)
def test_a_manifest_names_nothing_outside_of_its_folder(column, value, tmp_path):
    out, aside = tmp_path / "out", tmp_path / "aside"
    row = {"image_id": "cat", "label": "cat", "split": "train", "source_id": "cat"}
    row |= {"file_name": "a..b/cat.png", "edit_key": "0" * 32, "source_sha256": "", "sha256": ""}
    write_images(out, "raw", [(row, b"")], {"train": 1}, aside=aside)
    rows = pd.read_parquet(out / MANIFEST)
    rows[column] = value
    rows.to_parquet(out / MANIFEST)
    with pytest.raises(pandera.errors.SchemaError, match=column):
        read_manifest(out)


def test_rows_are_identified_whatever_their_order():
    rows = pd.DataFrame({"label": ["cat", "dog", "cat"], "sha256": ["b", "a", "a"]}, dtype="string")
    assert rows_digest(rows) == rows_digest(rows[::-1]) == rows_digest(rows.astype(object))
    for changed in (rows[:2], rows.replace("dog", "cat"), pd.concat([rows, rows[:1]])):
        assert rows_digest(changed) != rows_digest(rows)
    lines = pd.DataFrame({"label": ['a", "b', "a"], "sha256": ["c", 'b", "c']})
    assert rows_digest(lines[:1]) != rows_digest(lines[1:])


@pytest.mark.parametrize(
    ("name", "depth", "said"),
    [("n", 1200, ""), ("n" * 240, 25, "a folder whose path is longer than the system takes")],
)
def test_folders_may_be_nested_however_deep(name, depth, said, tmp_path):
    with chdir(tmp_path):
        for _ in range(depth):
            Path(name).mkdir()
            os.chdir(name)
        Path("odd.png").touch()
    [(path, unusable)] = items.visible_entries(tmp_path)
    assert (path.name == "odd.png", unusable) == (not said, said)
    subprocess.run(["rm", "-r", tmp_path / name], check=True)  # pytest's own way has an end
