"""Promise: a mixed stage depends on its inputs, not on threads or on how many rows at once."""

import hashlib
from dataclasses import replace

import pytest
from conftest import quick_settings, write_classes, write_images

from diffusemix_pipeline.datasets import parts
from diffusemix_pipeline.datasets.images import png_bytes, read_square
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.mixing import stages
from diffusemix_pipeline.mixing.blending import mix
from diffusemix_pipeline.mixing.masks import half_mask

SETTINGS = quick_settings("source.train_per_class=null")


@pytest.fixture
def inputs(tmp_path):
    """Return originals, and for an edit of each one the original upside down."""
    photos = write_classes(tmp_path / "photos", ["cat", "dog"], 6)
    aside = tmp_path / "aside"
    raw = ingest(str(photos), SETTINGS, tmp_path / "raw", aside=aside, train_only=True)
    images = []
    for row in raw.manifest().to_dict("records"):
        name = f"{row['label']}/{row['sha256'][:8]}.png"
        content = png_bytes(read_square(raw.folder / row["file_name"], 32)[::-1].copy())
        sha256 = hashlib.sha256(content).hexdigest()
        itself = {"image_id": name, "file_name": name, "source_id": row["image_id"]}
        images.append(
            ({**row, **itself, "edit_key": row["sha256"][:32], "sha256": sha256}, content)
        )
    parts = raw.layout["parts"]
    return raw, write_images(tmp_path / "generated", "generated", images, parts, aside=aside)


def augmented(inputs, tmp_path, name):
    return stages.make_augmented(
        *inputs,
        SETTINGS,
        tmp_path / name,
        fractal_cache=tmp_path / "fractals",
        aside=tmp_path / "aside",
    )


def test_threads_and_chunks_of_rows_change_no_byte(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "usable_cores", lambda: 7)
    many = augmented(inputs, tmp_path, "many")
    monkeypatch.setattr(parts, "usable_cores", lambda: 1)
    monkeypatch.setattr(stages, "_AT_ONCE", 5)
    one = augmented(inputs, tmp_path, "one")
    assert one.version == many.version
    for path in many.folder.rglob("*.*"):
        copy = one.folder / path.relative_to(many.folder)
        assert copy.read_bytes() == path.read_bytes()


def test_each_image_is_the_equation_of_its_row(inputs, tmp_path):
    raw, generated = inputs
    stage = augmented(inputs, tmp_path, "augmented")
    originals = raw.manifest().set_index("image_id")["file_name"]
    for row in stage.manifest().itertuples():
        original = read_square(raw.folder / originals[row.source_id], 32)
        edit = read_square(generated.folder / row.file_name, 32)
        fractal = read_square(next(tmp_path.glob(f"fractals/*/{row.fractal_id}.png")), 32)
        expected = mix(original, edit, half_mask(row.mask, 32, 32), fractal, row.lam)
        assert (read_square(stage.folder / row.file_name, 32) == expected).all()
        content = (stage.folder / row.file_name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row.sha256
    assert len(stage.manifest()) == 12


def test_an_unreadable_edit_ends_the_stage_and_leaves_no_folder(inputs, tmp_path):
    _, generated = inputs
    (generated.folder / generated.manifest()["file_name"][3]).write_bytes(b"torn")
    with pytest.raises(Exception, match="cannot identify image file"):
        augmented(inputs, tmp_path, "augmented")
    assert not (tmp_path / "augmented").exists()


def test_edits_of_other_images_than_there_are_now_are_named(inputs, tmp_path):
    raw, generated = inputs
    photos = write_classes(tmp_path / "others", ["cat", "dog"], 3, seed=5)
    others = ingest(
        str(photos), SETTINGS, tmp_path / "raw2", aside=tmp_path / "aside", train_only=True
    )
    with pytest.raises(UserError, match="of other images than data/raw holds now"):
        augmented((others, generated), tmp_path, "augmented")
    assert not (tmp_path / "augmented").exists()
    parts_of_raw = {**raw.layout, "parts": {"train": 8}}
    with pytest.raises(UserError, match="of other images than data/raw holds now"):
        augmented((replace(raw, layout=parts_of_raw), generated), tmp_path, "augmented")
