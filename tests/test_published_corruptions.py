"""Published sets of corrupted images: both layouts are read, in the order that pairs them."""

import numpy as np
import pytest
import torch
from conftest import picture
from trained_digits import SIDE, digits, digits_model

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.evidence import evaluate
from diffusemix_pipeline.evaluation.published_corruptions import (
    check_corrupted_sets,
    corrupted_sets_version,
    counted,
    read_corrupted_sets,
)
from diffusemix_pipeline.settings import Evaluation
from diffusemix_pipeline.training.data import DecodedImages, LabelledImages

CLASSES = ["n01 cat", "n02 dog"]


def write_arrays(folder, images: int = 4, families: tuple[str, ...] = ("fog", "snow")) -> None:
    """Write CIFAR-10-C's layout: severities in turn, an image's grey level tells both."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "labels.npy", np.tile(np.arange(images) % 2, 5).astype(np.uint8))
    levels = np.arange(5 * images, dtype=np.uint8).reshape(-1, 1, 1, 1)
    for number, family in enumerate(families):
        np.save(
            folder / f"{family}.npy",
            np.broadcast_to(levels + 100 * number, (5 * images, 32, 32, 3)),
        )


def write_folders(folder) -> None:
    for severity in (1, 3):
        for label in ("n01", "n02"):
            place = folder / "fog" / str(severity) / label
            place.mkdir(parents=True, exist_ok=True)
            for number in range(3):
                picture(severity * 10 + number).save(place / f"{number}.JPEG", quality=95)


def test_arrays_hold_severities_in_turn(tmp_path):
    write_arrays(tmp_path)
    sets = read_corrupted_sets(str(tmp_path), CLASSES)
    assert [one.name for one in sets[:6]] == [f"fog/{s}" for s in range(1, 6)] + ["snow/1"]
    third = sets[2].read(1, 3, 32)
    assert third.shape == (2, 32, 32, 3)
    assert third[:, 0, 0, 0].tolist() == [9, 10]
    assert sets[2].labels.tolist() == [0, 1, 0, 1]
    assert sets[6].read(0, 1, 16).shape == (1, 16, 16, 3)
    assert sets[6].read(0, 1, 16)[0, 0, 0, 0] == 104


def test_folders_are_known_by_class_or_synset(tmp_path):
    write_folders(tmp_path)
    sets = read_corrupted_sets(str(tmp_path), CLASSES)
    assert [one.name for one in sets] == ["fog/1", "fog/3"]
    assert sets[0].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert sets[1].read(2, 5, 24).shape == (3, 24, 24, 3)
    assert len(read_corrupted_sets(str(tmp_path), ["n01", "n02", "n03"])) == 2


def test_what_lies_beside_the_images_is_no_image(tmp_path):
    stray = tmp_path / "fog" / "1" / "n01"
    stray.mkdir(parents=True)
    for name in (".DS_Store", "._0.JPEG", "list.txt"):
        (stray / name).write_text("x")
    with pytest.raises(UserError, match="holds neither"):
        check_corrupted_sets(str(tmp_path))
    write_folders(tmp_path)
    sets = read_corrupted_sets(str(tmp_path), CLASSES)
    assert [len(one.labels) for one in sets] == [6, 6]
    assert sets[0].read(0, 6, 24).shape == (6, 24, 24, 3)


def test_what_is_laid_out_otherwise_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_corrupted_sets(str(tmp_path / "nowhere"), CLASSES)
    with pytest.raises(UserError, match="does not exist"):
        check_corrupted_sets(str(tmp_path / "nowhere"))
    for refuse in (check_corrupted_sets, lambda place: read_corrupted_sets(place, CLASSES)):
        with pytest.raises(UserError, match="holds neither"):
            refuse(str(tmp_path))
    write_folders(tmp_path)
    check_corrupted_sets(str(tmp_path))
    with pytest.raises(UserError, match="fog/1 has the class n02"):
        read_corrupted_sets(str(tmp_path), ["n01"])
    next((tmp_path / "fog" / "3" / "n01").iterdir()).unlink()
    with pytest.raises(UserError, match="fog/3 has other images than fog/1"):
        read_corrupted_sets(str(tmp_path), CLASSES)
    arrays = tmp_path / "arrays"
    write_arrays(arrays)
    np.save(arrays / "snow.npy", np.zeros((3, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"snow.npy is uint8 \(3, 32, 32, 3\)"):
        read_corrupted_sets(str(arrays), CLASSES)
    with pytest.raises(UserError, match="labels below 1"):
        read_corrupted_sets(str(arrays), ["n01"])
    np.save(arrays / "snow.npy", np.array([{}], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        read_corrupted_sets(str(arrays), CLASSES)


def test_the_version_follows_from_the_files(tmp_path):
    write_arrays(tmp_path)
    before = corrupted_sets_version(str(tmp_path))
    assert corrupted_sets_version(str(tmp_path)) == before
    labels = np.load(tmp_path / "labels.npy")
    np.save(tmp_path / "labels.npy", 1 - labels)  # as long as before
    assert corrupted_sets_version(str(tmp_path)) != before
    np.save(tmp_path / "labels.npy", labels)
    assert corrupted_sets_version(str(tmp_path)) == before
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "README.txt").write_text("x")
    assert corrupted_sets_version(str(tmp_path)) == before
    write_arrays(tmp_path, 5)
    assert corrupted_sets_version(str(tmp_path)) != before
    assert corrupted_sets_version("") == ""
    assert read_corrupted_sets("", CLASSES) == []


def test_an_average_is_over_the_fifteen_families_where_there_are_any():
    assert counted(["fog/1", "gaussian_blur/1", "snow/5", "saturate/2"]) == [0, 2]
    assert counted(["dark/1", "dark/2"]) == [0, 1]


def test_classifiers_are_asked_about_every_set(tmp_path):
    pixels, labels = (part[:40] for part in digits()[1])
    clean = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    names = [str(number) for number in range(10)]
    folder = tmp_path / "sets"
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels.numpy(), 5).astype(np.uint8))
    dark = [clean // divisor for divisor in (1, 2, 4, 16, 255)]
    np.save(folder / "dark.npy", np.concatenate(dark))
    test = LabelledImages(
        DecodedImages(clean, SIDE, tmp_path), labels.numpy(), list(map(str, range(40)))
    )
    answers = evaluate(
        {"it": digits_model()},
        test,
        Evaluation(
            corruptions=["fog"], severities=[1], attack_images=0, autoattack_images=0, batch_size=7
        ),
        0,
        "cpu",
        partial={"it": tmp_path / "partial"},
        sets=read_corrupted_sets(str(folder), names),
    )
    found = dict(answers)["it"]
    assert found.published_sets == tuple(f"dark/{severity}" for severity in range(1, 6))
    assert np.array_equal(found.published[0], found.correct)
    with torch.no_grad():
        answers = digits_model()(torch.from_numpy(dark[2]).permute(0, 3, 1, 2) / 255).argmax(1)
    assert np.array_equal(found.published[2], (answers == labels).numpy())
    assert found.published[0].mean() > found.published[4].mean()
