"""Published datasets by name: their archives, official splits and sizes, terms, and readers.

A reader gives the items of an unpacked dataset. None unpickles anything: CIFAR is read in its
binary version and ImageNet without torchvision, whose loaders unpickle. Where the official test
images have no published labels, the official val is the test here.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffusemix_pipeline.datasets.archives import (
    Archive,
    check_obtainable,
    downloadable,
    provide,
)
from diffusemix_pipeline.datasets.images import png_bytes
from diffusemix_pipeline.datasets.items import Item, file_item, visible_files
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.progress import Progress, silent

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_BYTES = 3 * 32 * 32


class Published(NamedTuple):
    """What is known of a published dataset."""

    title: str
    archives: tuple[Archive, ...]
    images: Mapping[str, int]
    """The official number in each split that the publisher gives."""
    classes: int
    """The official number, the same in each split."""
    page: str
    terms: str
    """The licence, or the terms of use, as the publisher states them."""
    read: Callable[[Path], Iterator[Item]]
    """Give the items below the folder of archives."""


def terms(name: str) -> str:
    """Return, for people, under which terms a dataset is published."""
    facts = PUBLISHED[name]
    return f"{facts.title}: {facts.terms} See {facts.page}."


def check_at_hand(name: str, folder: Path) -> None:
    """Raise UserError where archives of a dataset are neither in `folder` nor to be downloaded."""
    facts = PUBLISHED[name]
    check_obtainable(facts.archives, folder, facts.page)


def published_items(name: str, folder: Path, progress: Progress = silent) -> Iterator[Item]:
    """Give a published dataset's images in a fixed order, fetched and unpacked where need be.

    Raises UserError for archives that cannot be had, and for what is not as it was published:
    damaged files, other numbers of images or classes.
    """
    facts = PUBLISHED[name]
    provide(facts.archives, folder, facts.page, progress)
    counts: Counter[tuple[str | None, str]] = Counter()
    total = sum(facts.images.values())
    try:
        for done, item in enumerate(facts.read(folder), start=1):
            counts[item.split, item.label] += 1
            progress(f"Reading {name}", done, total)
            yield item
    except Exception as error:  # of text, SciPy and torchvision: dozens of types for damaged files
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{name} is not as it was published ({reason}). {_repair(facts, folder)}"
        ) from error
    for split, expected in facts.images.items():
        by_class = [count for (of_split, _), count in counts.items() if of_split == split]
        if (sum(by_class), len(by_class)) != (expected, facts.classes):
            raise UserError(
                f"{name}: {split} has {sum(by_class):,} images of {len(by_class):,} classes, but "
                f"{expected:,} of {facts.classes:,} were published. {_repair(facts, folder)}"
            )


def _repair(facts: Published, folder: Path) -> str:
    unpacked = folder / Path(facts.archives[0].gives).parts[0]
    return f"Remove {unpacked} and unpack the archives again, or get them anew: {facts.page}."


def _image(root: Path, path: Path, label: str, split: str) -> Item:
    if ".." in path.parts or not path.is_relative_to(root):
        raise UserError(f"{path} would lie outside of {root}")
    item = file_item(root, path, label, split)
    if not item.sha256:
        raise UserError(f"{path} is listed, but cannot be read")
    return item


def _label(name: str) -> str:
    """Return a class name that one folder can bear: F/A-18 becomes F-A-18."""
    return re.sub(r"[/\\\0]", "-", name.replace("_", " ")).strip(" .")


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


class _CifarImage(NamedTuple):
    """An image in a file of many; no limit of pixels concerns it."""

    path: str
    offset: int

    def read(self, max_pixels: int) -> Image.Image:
        return Image.fromarray(self._pixels())

    def stored(self, max_pixels: int) -> tuple[bytes, str]:
        return png_bytes(self._pixels()), ".png"

    def _pixels(self) -> np.ndarray:
        """Return uint8 (32, 32, 3)."""
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            channels = np.frombuffer(file.read(_CIFAR_BYTES), np.uint8).reshape(_CIFAR_SHAPE)
        return np.ascontiguousarray(np.moveaxis(channels, 0, 2))


def _cifar(
    root: Path, *, folder: str, names: str, files: Mapping[str, str], label_bytes: int
) -> Iterator[Item]:
    """Read records of `label_bytes`, the last of which counts, and an image, channel by channel."""
    classes = [_label(name) for name in _lines(root / folder / names)]
    record_bytes = label_bytes + _CIFAR_BYTES
    for name, split in files.items():
        path = root / folder / name
        with path.open("rb") as file:
            for number in range(-(-path.stat().st_size // record_bytes)):
                record = file.read(record_bytes)
                if len(record) != record_bytes:
                    raise UserError(f"{path} ends within image {number}")
                yield Item(
                    source_id=f"{folder}/{name}/{number:05d}",
                    label=classes[record[label_bytes - 1]],
                    split=split,
                    sha256=hashlib.sha256(record[label_bytes:]).hexdigest(),
                    picture=_CifarImage(str(path), number * record_bytes + label_bytes),
                )


def _torchvision(root: Path, *, loader: str, splits: tuple[str, ...]) -> Iterator[Item]:
    """Read what torchvision's loader finds; its own downloads would unpack in place."""
    import torchvision.datasets

    for split in splits:
        dataset = getattr(torchvision.datasets, loader)(root, split, loader=Path)
        classes = [_label(name) for name in dataset.classes]
        for path, label in dataset:
            yield _image(root, path, classes[label], split)


def _tiny_imagenet(root: Path) -> Iterator[Item]:
    base = root / "tiny-imagenet-200"
    words = dict(line.split("\t", 1) for line in _lines(base / "words.txt"))
    classes = {wnid: _synset(wnid, words[wnid]) for wnid in _lines(base / "wnids.txt")}
    for wnid in sorted(classes):
        for path in visible_files(base / "train" / wnid / "images"):
            yield _image(root, path, classes[wnid], "train")
    for line in _lines(base / "val" / "val_annotations.txt"):
        name, wnid = line.split("\t")[:2]
        yield _image(root, base / "val" / "images" / name, classes[wnid], "test")


def _imagenet(root: Path) -> Iterator[Item]:
    """Read `train/<wnid>/` and `val/`, whose files may lie in class folders or not."""
    from scipy.io import loadmat

    base = root / "imagenet"
    devkit = base / "ILSVRC2012_devkit_t12" / "data"
    synsets = loadmat(devkit / "meta.mat", squeeze_me=True)["synsets"]
    leaves = {int(s["ILSVRC2012_ID"]): s for s in synsets if s["num_children"] == 0}
    classes = {number: _synset(s["WNID"], s["words"]) for number, s in leaves.items()}
    for number, synset in sorted(leaves.items()):
        for path in visible_files(base / "train" / synset["WNID"]):
            yield _image(root, path, classes[number], "train")
    truth = [int(line) for line in _lines(devkit / "ILSVRC2012_validation_ground_truth.txt")]
    for path in sorted((base / "val").rglob("*.JPEG"), key=lambda path: path.name):
        place = int(path.stem.rpartition("_")[2])  # ILSVRC2012_val_00000001.JPEG is the first
        yield _image(root, path, classes[truth[place - 1]], "test")


def _synset(wnid: str, words: str) -> str:
    """Return a name that no other synset has: two are called crane."""
    return _label(f"{wnid} {words.split(',')[0]}")


def _cub(root: Path) -> Iterator[Item]:
    base = root / "CUB_200_2011"
    names, labels, in_train, images = (
        dict(line.split(maxsplit=1) for line in _lines(base / f"{table}.txt"))
        for table in ("classes", "image_class_labels", "train_test_split", "images")
    )
    classes = {number: _label(name.partition(".")[2]) for number, name in names.items()}
    for number, name in images.items():
        split = "train" if in_train[number] == "1" else "test"
        yield _image(root, base / "images" / name, classes[labels[number]], split)


_NON_COMMERCIAL = "for non-commercial research and educational purposes only."
_CITED = "its publisher states no licence, and asks to be cited."
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_TORONTO = "https://www.cs.toronto.edu/~kriz"

# Checksums are those of the publishers' pages, of torchvision, or of many who use the same files.
PUBLISHED: dict[str, Published] = {
    "cifar10": Published(
        title="CIFAR-10",
        archives=(
            downloadable(
                f"{_TORONTO}/cifar-10-binary.tar.gz",
                "cifar-10-batches-bin",
                "c32a1d4ab5d03f1284b67883e8d87530",
            ),
        ),
        images={"train": 50_000, "test": 10_000},
        classes=10,
        page=f"{_TORONTO}/cifar.html",
        terms=_CITED,
        read=partial(
            _cifar,
            folder="cifar-10-batches-bin",
            names="batches.meta.txt",
            files={
                **{f"data_batch_{number}.bin": "train" for number in range(1, 6)},
                "test_batch.bin": "test",
            },
            label_bytes=1,
        ),
    ),
    "cifar100": Published(
        title="CIFAR-100",
        archives=(
            downloadable(
                f"{_TORONTO}/cifar-100-binary.tar.gz",
                "cifar-100-binary",
                "03b5dce01913d631647c71ecec9e9cb8",
            ),
        ),
        images={"train": 50_000, "test": 10_000},
        classes=100,
        page=f"{_TORONTO}/cifar.html",
        terms=_CITED,
        read=partial(
            _cifar,
            folder="cifar-100-binary",
            names="fine_label_names.txt",
            files={"train.bin": "train", "test.bin": "test"},
            label_bytes=2,
        ),
    ),
    "tiny_imagenet": Published(
        title="Tiny-ImageNet-200",
        archives=(
            downloadable(
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                "tiny-imagenet-200",
                "90528d7ca1a48142e341f4ef8d21d0de",
            ),
        ),
        images={"train": 100_000, "test": 10_000},
        classes=200,
        page="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        terms=f"the archive states none; its images are ImageNet's, which are {_NON_COMMERCIAL}",
        read=_tiny_imagenet,
    ),
    "imagenet": Published(
        title="ImageNet (ILSVRC2012)",
        archives=(
            Archive("ILSVRC2012_devkit_t12.tar.gz", "imagenet/ILSVRC2012_devkit_t12"),
            Archive("ILSVRC2012_img_train.tar", "imagenet/train", flat=True),
            Archive("ILSVRC2012_img_val.tar", "imagenet/val", flat=True),
        ),
        images={"train": 1_281_167, "test": 50_000},
        classes=1000,
        page="https://image-net.org/challenges/LSVRC/2012/2012-downloads.php (with an account)",
        terms=f"under ImageNet's terms of access, {_NON_COMMERCIAL}",
        read=_imagenet,
    ),
    "flowers102": Published(
        title="Oxford Flowers-102",
        archives=(
            downloadable(
                f"{_OXFORD}/flowers/102/102flowers.tgz",
                "flowers-102/jpg",
                "52808999861908f626f3c1f4e79d11fa",
            ),
            downloadable(
                f"{_OXFORD}/flowers/102/imagelabels.mat",
                "flowers-102/imagelabels.mat",
                "e0620be6f572b9609742df49c70aed4d",
            ),
            downloadable(
                f"{_OXFORD}/flowers/102/setid.mat",
                "flowers-102/setid.mat",
                "a5357ecc9cb78c4bef273ce3793fc85c",
            ),
        ),
        images={"train": 1020, "val": 1020, "test": 6149},
        classes=102,
        page=f"{_OXFORD}/flowers/102/",
        terms="its publisher states no licence.",
        read=partial(_torchvision, loader="Flowers102", splits=("train", "val", "test")),
    ),
    "stanford_cars": Published(
        title="Stanford Cars",
        archives=(
            Archive("car_devkit.tgz", "stanford_cars/devkit"),
            Archive("cars_train.tgz", "stanford_cars/cars_train"),
            Archive("cars_test.tgz", "stanford_cars/cars_test"),
            Archive(
                "cars_test_annos_withlabels.mat", "stanford_cars/cars_test_annos_withlabels.mat"
            ),
        ),
        images={"train": 8144, "test": 8041},
        classes=196,
        page="https://github.com/pytorch/vision/issues/7545 (says where copies are: the "
        "publisher's page, https://ai.stanford.edu/~jkrause/cars/car_dataset.html, is gone)",
        terms="the archives state none, and the publisher's page is gone; mostly taken to be for "
        "non-commercial research only.",
        read=partial(_torchvision, loader="StanfordCars", splits=("train", "test")),
    ),
    "fgvc_aircraft": Published(
        title="FGVC-Aircraft",
        archives=(
            downloadable(
                f"{_OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
                "fgvc-aircraft-2013b",
                "d4acdd33327262359767eeaa97a4f732",
            ),
        ),
        images={"train": 3334, "val": 3333, "test": 3333},
        classes=100,
        page=f"{_OXFORD}/fgvc-aircraft/",
        terms="for non-commercial research purposes only; the photographers keep the copyright.",
        read=partial(_torchvision, loader="FGVCAircraft", splits=("train", "val", "test")),
    ),
    "cub200": Published(
        title="CUB-200-2011",
        archives=(
            downloadable(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                "CUB_200_2011",
                "97eceeb196236b17998738112f37df78",
            ),
        ),
        images={"train": 5994, "test": 5794},
        classes=200,
        page="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        terms="the archive states none, and asks to be cited; mostly taken to be for "
        "non-commercial research only.",
        read=_cub,
    ),
}
