"""Promise: a dataset given by name is read as it was published, or refused with what to do.

Every archive here is a miniature in the publisher's own format: names, folders, tables, records.
"""

import hashlib
import io
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import QUICK, picture, quick_settings, write_classes
from PIL import Image
from scipy.io import savemat

from diffusemix_pipeline.cli import main
from diffusemix_pipeline.datasets.images import read_rgb
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.items import Item
from diffusemix_pipeline.datasets.published import PUBLISHED, check_at_hand, published_items, terms
from diffusemix_pipeline.datasets.sources import list_images
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.preflight import check_run

PIXELS = 10_000_000


class Expected(NamedTuple):
    """What an item should say of itself."""

    split: str
    label: str
    content: bytes
    """The bytes that its digest is of."""


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, (64, 48)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def mat(**variables: object) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


def struct(rows: list[dict[str, object]], shape: tuple[int, int]) -> np.ndarray:
    """Return MATLAB's struct array."""
    array = np.empty(len(rows), dtype=[(name, object) for name in rows[0]])
    for place, row in enumerate(rows):
        array[place] = tuple(row.values())
    return array.reshape(shape)


def tar_bytes(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files, "w" if path.suffix == ".tar" else "w:gz"))


def write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


# The miniatures: each writes the archives and returns the items that they should give


def cifar_pixels(seed: int) -> np.ndarray:
    """Return uint8 (32, 32, 3), whose channels differ."""
    return np.asarray(picture(seed, (32, 32)))


def cifar_record(seed: int, *labels: int) -> bytes:
    """Return label bytes, then 1024 red, 1024 green and 1024 blue values, row by row."""
    pixels = cifar_pixels(seed)
    return bytes(labels) + b"".join(pixels[:, :, channel].tobytes() for channel in range(3))


def write_cifar10(folder: Path) -> dict[str, Expected]:
    names = ["airplane", "automobile", "bird"]
    files = {"batches.meta.txt": ("\n".join(names) + "\n\n").encode(), "readme.html": b"<html>"}
    expected = {}
    batches = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for batch, name in enumerate(batches):
        records = [cifar_record(10 * batch + number, number) for number in range(3)]
        files[name] = b"".join(records)
        for number, record in enumerate(records):
            split = "test" if name == "test_batch.bin" else "train"
            source_id = f"cifar-10-batches-bin/{name}/{number:05d}"
            expected[source_id] = Expected(split, names[number], record[1:])
    inside = {f"cifar-10-batches-bin/{name}": content for name, content in files.items()}
    write_tar(folder / "cifar-10-binary.tar.gz", inside)
    return expected


def write_cifar100(folder: Path) -> dict[str, Expected]:
    names = ["apple", "aquarium_fish", "baby"]
    files = {
        "fine_label_names.txt": ("\n".join(names) + "\n").encode(),
        "coarse_label_names.txt": b"fruit\nfish\npeople\n",
    }
    expected = {}
    for split, images in (("train", 4), ("test", 1)):
        records = []
        for number in range(3 * images):
            fine = number % 3
            records.append(cifar_record(len(expected) + number, 2 - fine, fine))
        for number, record in enumerate(records):
            label = names[number % 3].replace("_", " ")
            source_id = f"cifar-100-binary/{split}.bin/{number:05d}"
            expected[source_id] = Expected(split, label, record[2:])
        files[f"{split}.bin"] = b"".join(records)
    inside = {f"cifar-100-binary/{name}": content for name, content in files.items()}
    write_tar(folder / "cifar-100-binary.tar.gz", inside)
    return expected


def write_tiny_imagenet(folder: Path) -> dict[str, Expected]:
    words = {
        "n01443537": "goldfish, Carassius auratus",
        "n02012849": "crane",
        "n03126707": "crane",
        "n00001740": "entity",  # words.txt knows all of WordNet
    }
    wnids = [wnid for wnid in words if words[wnid] != "entity"]
    labels = {wnid: f"{wnid} {words[wnid].split(',')[0]}" for wnid in wnids}
    images: dict[str, Expected] = {}
    files = {
        "wnids.txt": "\n".join(reversed(wnids)).encode(),
        "words.txt": "\n".join(f"{wnid}\t{text}" for wnid, text in words.items()).encode(),
        "test/images/test_0.JPEG": jpeg(999),
    }
    annotations = []
    for place, wnid in enumerate(wnids):
        for number in range(4):
            name = f"train/{wnid}/images/{wnid}_{number}.JPEG"
            images[name] = Expected("train", labels[wnid], jpeg(100 * place + number))
        files[f"train/{wnid}/{wnid}_boxes.txt"] = f"{wnid}_0.JPEG\t0\t0\t62\t62\n".encode()
        for number in (place, place + 3):
            name = f"val_{number}.JPEG"
            images[f"val/images/{name}"] = Expected("test", labels[wnid], jpeg(500 + number))
            annotations.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    files["val/val_annotations.txt"] = "".join(annotations).encode()
    inside = files | {name: image.content for name, image in images.items()}
    base = "tiny-imagenet-200/"
    write_zip(folder / "tiny-imagenet-200.zip", {base + k: v for k, v in inside.items()})
    return {base + name: image for name, image in images.items()}


def write_imagenet(folder: Path) -> dict[str, Expected]:
    leaves = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane"}
    synsets = [
        synset(number, wnid, text) for number, (wnid, text) in enumerate(leaves.items(), start=1)
    ]
    synsets.append(synset(1001, "n00017222", "plant, flora", children=[2, 3]))
    truth = [3, 1, 2, 2, 1, 3]
    devkit = {
        "data/meta.mat": mat(synsets=struct(synsets, (len(synsets), 1))),
        "data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in truth).encode(),
        "readme.txt": b"the development kit",
    }
    inside = {f"ILSVRC2012_devkit_t12/{name}": content for name, content in devkit.items()}
    write_tar(folder / "ILSVRC2012_devkit_t12.tar.gz", inside)
    labels = [f"{wnid} {text.split(',')[0]}" for wnid, text in leaves.items()]
    expected, tars, val = {}, {}, {}
    for place, wnid in enumerate(leaves):
        images = {f"{wnid}_{n}.JPEG": jpeg(100 * place + n) for n in (18, 36, 7, 9)}
        tars[f"{wnid}.tar"] = tar_bytes(images)
        for name, content in images.items():
            source_id = f"imagenet/train/{wnid}/{name}"
            expected[source_id] = Expected("train", labels[place], content)
    for place, number in enumerate(truth, start=1):
        name = f"ILSVRC2012_val_{place:08d}.JPEG"
        val[name] = jpeg(700 + place)
        expected[f"imagenet/val/{name}"] = Expected("test", labels[number - 1], val[name])
    write_tar(folder / "ILSVRC2012_img_train.tar", tars)
    write_tar(folder / "ILSVRC2012_img_val.tar", val)
    return expected


def synset(number: int, wnid: str, words: str, children: list[int] | None = None):
    """Return a row of the development kit's table, its fields in their order."""
    return {
        "ILSVRC2012_ID": float(number),
        "WNID": wnid,
        "words": words,
        "gloss": "what it is",
        "num_children": float(len(children or [])),
        "children": np.array(children or [], dtype=np.float64),
        "wordnet_height": 0.0,
        "num_train_images": 4.0,
    }


def write_flowers102(folder: Path) -> dict[str, Expected]:
    names = ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"]
    splits = {"trnid": "train", "valid": "val", "tstid": "test"}
    labels, ids, images, expected = [], {key: [] for key in splits}, {}, {}
    for number in range(1, 19):
        key = list(splits)[number % 3]
        labels.append(1 + number % 2 if number < 7 else 3)
        ids[key].append(number)
        name = f"jpg/image_{number:05d}.jpg"
        images[name] = jpeg(number)
        expected[f"flowers-102/{name}"] = Expected(splits[key], names[labels[-1] - 1], images[name])
    write_tar(folder / "102flowers.tgz", images)
    tables = {key: np.array([value], dtype=np.uint16) for key, value in ids.items()}
    (folder / "setid.mat").write_bytes(mat(**tables))
    (folder / "imagelabels.mat").write_bytes(mat(labels=np.array([labels], dtype=np.uint8)))
    return expected


def write_stanford_cars(folder: Path) -> dict[str, Expected]:
    names = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo 2012"]
    expected, rows = {}, {"train": [], "test": []}
    for split, images in (("train", 12), ("test", 6)):
        files = {}
        for number in range(1, images + 1):
            name = f"cars_{split}/{number:05d}.jpg"
            files[name] = jpeg(100 * len(split) + number)
            rows[split].append(annotation(1 + number % 3, f"{number:05d}.jpg"))
            label = names[number % 3].replace("/", "-")
            expected[f"stanford_cars/{name}"] = Expected(split, label, files[name])
        write_tar(folder / f"cars_{split}.tgz", files)
    unlabelled = [{k: v for k, v in row.items() if k != "class"} for row in rows["test"]]
    devkit = {
        "cars_meta.mat": mat(class_names=np.array([names], dtype=object)),
        "cars_train_annos.mat": mat(annotations=struct(rows["train"], (1, 12))),
        "cars_test_annos.mat": mat(annotations=struct(unlabelled, (1, 6))),
    }
    write_tar(folder / "car_devkit.tgz", {f"devkit/{k}": v for k, v in devkit.items()})
    labelled = mat(annotations=struct(rows["test"], (1, 6)))
    (folder / "cars_test_annos_withlabels.mat").write_bytes(labelled)
    return expected


def annotation(number: int, name: str) -> dict[str, object]:
    box = dict.fromkeys(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), np.uint16(7))
    return {**box, "class": np.uint8(number), "fname": name}


def write_fgvc_aircraft(folder: Path) -> dict[str, Expected]:
    names = ["707-320", "Cessna 172", "F/A-18"]
    expected, lists, images = {}, {"train": "", "val": "", "test": ""}, {}
    for number in range(18):
        split, name = list(lists)[number % 3], names[number // 6]
        file = f"data/images/{1025794 + number:07d}.jpg"
        images[file] = jpeg(number)
        lists[split] += f"{1025794 + number:07d} {name}\n"
        label = name.replace("/", "-")
        expected[f"fgvc-aircraft-2013b/{file}"] = Expected(split, label, images[file])
    files = {f"data/images_variant_{k}.txt": v.encode() for k, v in lists.items()}
    files["data/variants.txt"] = "".join(f"{name}\n" for name in names).encode()
    inside = {f"fgvc-aircraft-2013b/{k}": v for k, v in (files | images).items()}
    write_tar(folder / "fgvc-aircraft-2013b.tar.gz", inside)
    return expected


def write_cub200(folder: Path) -> dict[str, Expected]:
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    tables = dict.fromkeys(("images", "image_class_labels", "train_test_split"), "")
    expected, images = {}, {}
    for number in range(1, 19):
        place = number % 3
        name = f"{names[place]}/{names[place][4:]}_{number:04d}.jpg"
        images[f"images/{name}"] = jpeg(number)
        tables["images"] += f"{number} {name}\n"
        tables["image_class_labels"] += f"{number} {place + 1}\n"
        tables["train_test_split"] += f"{number} {int(number <= 12)}\n"
        expected[f"CUB_200_2011/images/{name}"] = Expected(
            "train" if number <= 12 else "test",
            names[place][4:].replace("_", " "),
            images[f"images/{name}"],
        )
    tables["classes"] = "".join(f"{n} {name}\n" for n, name in enumerate(names, start=1))
    files = {f"{name}.txt": text.encode() for name, text in tables.items()}
    inside = {f"CUB_200_2011/{k}": v for k, v in (files | images).items()}
    write_tar(folder / "CUB_200_2011.tgz", {**inside, "attributes.txt": b"1 has_bill_shape\n"})
    return expected


WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "tiny_imagenet": write_tiny_imagenet,
    "imagenet": write_imagenet,
    "flowers102": write_flowers102,
    "stanford_cars": write_stanford_cars,
    "fgvc_aircraft": write_fgvc_aircraft,
    "cub200": write_cub200,
}


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """Write a dataset's miniature archives, as whose official numbers their own are taken."""

    def write(name: str) -> tuple[Path, dict[str, Expected]]:
        folder = tmp_path / "archives"
        folder.mkdir()
        expected = WRITERS[name](folder)
        found = [image.split for image in expected.values()]
        images = {split: found.count(split) for split in PUBLISHED[name].images}
        facts = PUBLISHED[name]._replace(images=images, classes=3)
        monkeypatch.setitem(PUBLISHED, name, facts)
        if name == "flowers102":
            accept_tables(folder, monkeypatch)
        return folder, expected

    return write


def accept_tables(folder: Path, monkeypatch) -> None:
    """Let torchvision take these tables of Flowers-102, whose checksums it knows, for the true."""
    from torchvision.datasets import Flowers102

    sums = {
        key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        for key, (name, _) in Flowers102._file_dict.items()
    }
    monkeypatch.setattr(Flowers102, "_file_dict", sums)


def items_of(source: str, archives: Path | None = None) -> list[Item]:
    listing = list_images(source, archives)
    rows = listing.rows[list(Item._fields[:-1])].itertuples(index=False, name=None)
    return [Item(*row, picture) for row, picture in zip(rows, listing.pictures(), strict=True)]


def said(items) -> dict[str, tuple[str | None, str, str]]:
    return {item.source_id: (item.split, item.label, item.sha256) for item in items}


# Reading


def test_every_dataset_has_a_miniature():
    assert set(WRITERS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_dataset_is_read_as_it_was_published(name, miniature):
    folder, expected = miniature(name)
    packed = {path: path.read_bytes() for path in folder.iterdir()}
    items = items_of(name, folder)
    assert said(items) == {
        source_id: (image.split, image.label, hashlib.sha256(image.content).hexdigest())
        for source_id, image in expected.items()
    }
    for item in items:
        assert item.picture.read(PIXELS).size == ((32, 32) if "cifar" in name else (64, 48))
    assert {path: path.read_bytes() for path in packed} == packed
    for path in packed:  # what is unpacked is enough
        path.unlink()
    assert said(items_of(name, folder)) == said(items)
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_pixels_are_right_in_every_channel(name, miniature):
    folder, expected = miniature(name)
    for item in items_of(name, folder):
        channels = np.frombuffer(expected[item.source_id].content, np.uint8).reshape(3, 32, 32)
        pixels = np.asarray(item.picture.read(PIXELS))
        assert all(np.array_equal(pixels[:, :, c], channels[c]) for c in range(3))
        png, suffix = item.picture.stored(PIXELS)
        assert suffix == ".png"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels)
    first = next(item for item in items_of(name, folder) if item.split == "train")
    assert np.array_equal(np.asarray(first.picture.read(PIXELS)), cifar_pixels(0))


def test_classes_of_one_name_stay_two(miniature):
    for_cranes = {item.label for item in items_of("imagenet", miniature("imagenet")[0])}
    assert for_cranes == {"n01440764 tench", "n02012849 crane", "n03126707 crane"}


def test_validation_images_may_lie_in_class_folders(miniature):
    folder, _ = miniature("imagenet")
    before = items_of("imagenet", folder)
    val = folder / "imagenet" / "val"
    for item in before:
        if item.split == "test":
            (val / item.label[:9]).mkdir(exist_ok=True)
            name = Path(item.source_id).name
            (val / name).rename(val / item.label[:9] / name)
    after = items_of("imagenet", folder)
    assert [(i.label, i.split, i.sha256) for i in before] == [
        (i.label, i.split, i.sha256) for i in after
    ]


def test_archives_may_lie_beside_what_they_become(miniature):
    folder, expected = miniature("flowers102")
    (folder / "flowers-102").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(folder / "flowers-102" / path.name)  # as torchvision leaves them
    assert len(items_of("flowers102", folder)) == len(expected)


def test_an_ingest_keeps_the_official_splits(miniature, tmp_path):
    folder, _ = miniature("cifar10")
    settings = quick_settings("source.train_per_class=null", "source.val_fraction=0.3")
    out, aside = tmp_path / "raw", tmp_path / "aside"
    stage = ingest("cifar10", settings, out, aside=aside, archives=folder)
    by_split = stage.counts["by_split"]
    assert by_split["test"] == {"airplane": 1, "automobile": 1, "bird": 1}
    for label in ("airplane", "automobile", "bird"):
        assert by_split["train"][label] + by_split["val"][label] == 5
    assert stage.notes["source"]["kind"] == "cifar10"
    assert "archives" not in stage.notes["source"]
    rows = stage.manifest().set_index("source_id")
    row = rows.loc["cifar-10-batches-bin/data_batch_1.bin/00000"]
    assert np.array_equal(np.asarray(read_rgb(out / row["file_name"], PIXELS)), cifar_pixels(0))
    assert ingest("cifar10", settings, out, aside=aside, archives=folder).reused


def test_a_folder_of_a_datasets_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "cifar10", ["cat", "dog"], 2)
    assert len(items_of("./cifar10")) == 4


# What is not as it was published


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_numbers_than_the_official_are_refused_by_name(name, miniature, monkeypatch):
    official = PUBLISHED[name]
    folder, _ = miniature(name)
    monkeypatch.setitem(PUBLISHED, name, official)
    train = official.images["train"]
    message = f"{name}: train has [0-9]+ images of 3 classes, but {train:,} of {official.classes:,}"
    with pytest.raises(UserError, match=message):
        items_of(name, folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_damaged_archive_is_named_and_leaves_nothing_behind(name, miniature):
    folder, _ = miniature(name)
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{largest.name} cannot be unpacked .* damaged"):
        items_of(name, folder)
    gives = next(a.gives for a in PUBLISHED[name].archives if a.name == largest.name)
    assert not (folder / gives).exists()
    assert not list(folder.rglob("*.partial"))


def test_an_archive_of_something_else_is_refused(miniature):
    folder, _ = miniature("cub200")
    write_tar(folder / "CUB_200_2011.tgz", {"CUB_200/images.txt": b""})
    with pytest.raises(UserError, match="there is no CUB_200_2011 in it"):
        items_of("cub200", folder)


@pytest.mark.parametrize(
    ("name", "archive", "member"),
    [
        ("cub200", "CUB_200_2011.tgz", "CUB_200_2011/../../../escaped"),
        ("cub200", "CUB_200_2011.tgz", "../escaped"),
        ("imagenet", "ILSVRC2012_img_train.tar", "...tar"),  # a tar in it, for the folder ".."
        ("imagenet", "ILSVRC2012_img_train.tar", "../escaped.tar"),
    ],
)
def test_a_tar_that_leads_out_of_its_folder_is_refused(name, archive, member, miniature):
    folder, _ = miniature(name)
    write_tar(folder / archive, {member: tar_bytes({"escaped": b"x"})})
    with pytest.raises(UserError, match=f"{archive} cannot be unpacked .*[Oo]utside"):
        items_of(name, folder)
    assert not list(folder.parent.rglob("escaped*"))


def test_a_tar_within_a_tar_is_held_to_the_same(miniature):
    folder, _ = miniature("imagenet")
    inner = tar_bytes({"../../../escaped": b"x"})
    write_tar(folder / "ILSVRC2012_img_train.tar", {"n01440764.tar": inner})
    with pytest.raises(UserError, match="cannot be unpacked .*outside"):
        items_of("imagenet", folder)
    assert not list(folder.parent.rglob("escaped*"))


def test_a_zip_that_leads_out_of_its_folder_is_refused(miniature):
    folder, _ = miniature("tiny_imagenet")
    write_zip(folder / "tiny-imagenet-200.zip", {"../escaped": b"x"})
    with pytest.raises(UserError, match="cannot be unpacked .*outside"):
        items_of("tiny_imagenet", folder)
    assert not list(folder.parent.rglob("escaped*"))


@pytest.mark.parametrize("elsewhere", ["../../../stranger.jpg", "/stranger.jpg"])
def test_a_table_that_names_a_file_elsewhere_is_refused(elsewhere, miniature, tmp_path):
    folder, _ = miniature("cub200")
    items_of("cub200", folder)
    (tmp_path / "stranger.jpg").write_bytes(jpeg(1))
    table = folder / "CUB_200_2011" / "images.txt"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([f"1 {elsewhere}", *lines[1:]]))
    with pytest.raises(UserError, match="would lie outside"):
        items_of("cub200", folder)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"cifar10", "cifar100"}))
def test_a_missing_image_is_told(name, miniature):
    folder, _ = miniature(name)
    last = items_of(name, folder)[-1]
    (folder / last.source_id).unlink()
    with pytest.raises(UserError, match="cannot be read|test has 5 images of 3 classes, but 6"):
        items_of(name, folder)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_torn_record_is_told(name, miniature):
    folder, _ = miniature(name)
    items_of(name, folder)
    batch = next(folder.rglob("test*.bin"))
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{batch.name} ends within image 2"):
        items_of(name, folder)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("imagenet", "imagenet/ILSVRC2012_devkit_t12/data/meta.mat"),
        ("flowers102", "flowers-102/setid.mat"),
        ("stanford_cars", "stanford_cars/devkit/cars_meta.mat"),
        ("cifar100", "cifar-100-binary/fine_label_names.txt"),
    ],
)
def test_a_damaged_table_is_told_with_the_repair(name, table, miniature):
    folder, _ = miniature(name)
    items_of(name, folder)
    (folder / table).write_bytes(b"")
    message = f"{name} is not as it was published .* unpack the archives again"
    with pytest.raises(UserError, match=message):
        items_of(name, folder)


# What is not there


@pytest.mark.parametrize("name", ["imagenet", "stanford_cars"])
def test_what_cannot_be_downloaded_is_asked_for_by_name(name, tmp_path):
    with pytest.raises(UserError) as error:
        items_of(name, tmp_path / "archives")
    for archive in PUBLISHED[name].archives:
        assert archive.name in str(error.value)
        assert archive.gives in str(error.value)
    assert f"{tmp_path / 'archives'} lacks" in str(error.value)
    assert "https://" in str(error.value)
    assert not (tmp_path / "archives").exists()


def test_only_what_is_missing_is_asked_for(miniature):
    folder, _ = miniature("imagenet")
    (folder / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(UserError, match=r"lacks ILSVRC2012_img_val\.tar, to be fetched"):
        check_at_hand("imagenet", folder)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"imagenet", "stanford_cars"}))
def test_a_failed_download_names_address_and_folder(name, tmp_path, monkeypatch):
    def no_network(*request, **how):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    folder = tmp_path / "archives"
    check_at_hand(name, folder)  # it may yet be downloaded
    with pytest.raises(UserError) as error:
        items_of(name, folder)
    assert f"{PUBLISHED[name].archives[0].url} could not be downloaded" in str(error.value)
    assert "no network" in str(error.value)
    assert f"put it into {folder}" in str(error.value)
    assert {path.name for path in folder.iterdir()} <= {".lock"}


@pytest.fixture
def offered(miniature, monkeypatch):
    """Let CIFAR-100's miniature be downloaded from a server on this machine."""
    folder, expected = miniature("cifar100")
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        (first,) = PUBLISHED["cifar100"].archives
        url = f"http://127.0.0.1:{server.server_port}/{first.name}"
        md5 = hashlib.md5((folder / first.name).read_bytes()).hexdigest()
        archive = first._replace(url=url, md5=md5)
        facts = PUBLISHED["cifar100"]._replace(archives=(archive,))
        monkeypatch.setitem(PUBLISHED, "cifar100", facts)
        yield folder / first.name, expected
        server.shutdown()


def test_what_is_downloaded_is_checked_and_unpacked(offered, tmp_path):
    archive, expected = offered
    folder, told = tmp_path / "project" / "published", []
    told_of = published_items("cifar100", folder, lambda what, done, total: told.append(what))
    items = list(told_of)
    assert len(items) == len(expected)
    assert (folder / archive.name).read_bytes() == archive.read_bytes()
    steps = [f"Downloading {archive.name}", f"Unpacking {archive.name}", "Reading cifar100"]
    assert list(dict.fromkeys(told)) == steps


def test_a_download_with_another_checksum_is_refused(offered, tmp_path):
    archive, _ = offered
    archive.write_bytes(archive.read_bytes() + b"more")
    folder = tmp_path / "published"
    with pytest.raises(UserError, match=r"could not be downloaded .*corrupted"):
        items_of("cifar100", folder)
    assert {path.name for path in folder.iterdir()} <= {".lock"}


# Beforehand


def test_a_missing_archive_is_told_before_any_work(project):
    with pytest.raises(UserError, match="lacks ILSVRC2012_devkit_t12.tar.gz"):
        check_run(project, quick_settings("source.path=imagenet"))
    check_run(project, quick_settings("source.path=cifar100"))


def test_archives_do_not_lie_where_only_the_pipeline_writes(project):
    inside = f"source.archives={project.data / 'downloads'}"
    with pytest.raises(UserError, match="source.archives: .* Name another folder"):
        check_run(project, quick_settings("source.path=cifar100", inside))


def test_terms_are_told():
    for name, facts in PUBLISHED.items():
        assert facts.title in terms(name)
        assert facts.page in terms(name)
    assert "non-commercial research" in terms("imagenet")
    assert "states no licence" in terms("cifar100")


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        ("stanford_cars", ["Stanford Cars: the archives state none", "lacks car_devkit.tgz"]),
        ("./stanford_cars", ["stanford_cars does not exist. Did you mean stanford_cars?"]),
    ],
)
def test_the_command_line_knows_a_name_from_a_folder(data, messages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = [setting for setting in QUICK if not setting.startswith("source.path")]
    given = [part for setting in others for part in ("--set", setting)]
    result = CliRunner().invoke(main, ["run", "--data", data, *given])
    assert result.exit_code == 2
    for message in messages:
        assert message in result.output
