"""Which image is for training, which for choosing, which for judging: by class, from a seed."""

from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.columns import values
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.own_code import is_own
from diffusemix_pipeline.settings import Source


def assign_splits(images: pd.DataFrame, source: Source, seed: int) -> pd.DataFrame:
    """Return the images that are used, each with its split; a source's own splits are kept.

    `images` has a row an image, with `label`, `split` (missing where the source does not say),
    `sha256` and `source_id`.

    Where there is no test, about `test_fraction` of each class is held out, where there is no val,
    about `val_fraction` of what then is train; `train_per_class` thins train last. Whether an image
    is held out follows from its content alone: neither names, order nor new images move it. Only
    where no image of a class would be held out, the nearest one is, and a class's last training
    image never is.

    Raises UserError for fewer than two classes, for val or test without images, and for a class
    that has no training image; it names the folder `source.path`.
    """
    present = set(images["split"].unique())
    used = images.assign(split=images["split"].fillna("train"))
    if "test" not in present:
        used = _hold_out(used, "test", source.test_fraction, seed)
    if "val" not in present:
        used = _hold_out(used, "val", source.val_fraction, seed)
    used = thin_train(used, source.train_per_class, seed)
    _check_classes(used, source.path)
    return used


def _hold_out(images: pd.DataFrame, split: str, fraction: float, seed: int) -> pd.DataFrame:
    train = images[images["split"] == "train"]
    labels, places = train["label"], _places(train, split, seed)
    rank, size = _rank(places, labels), labels.groupby(labels).transform("size")
    below = places < fraction
    nearest = ~below.groupby(labels).transform("any") & (rank == 1)
    held = ((below | nearest) & (rank < size)).reindex(images.index, fill_value=False)
    return images.assign(split=images["split"].mask(held, split))


def thin_train(images: pd.DataFrame, most: int | None, seed: int) -> pd.DataFrame:
    """Keep at most `most` training images a class, drawn from the seed; all where it is None."""
    if most is None:
        return images
    train = images[images["split"] == "train"]
    rank = _rank(_places(train, "few-shot", seed), train["label"])
    return images.drop(index=train.index[rank > most])


def _places(images: pd.DataFrame, purpose: str, seed: int) -> pd.Series:
    """Return each image's place in [0, 1) in the draw for `purpose`."""
    places = (seed_from(seed, purpose, sha256) / 2**63 for sha256 in values(images["sha256"]))
    return pd.Series(np.fromiter(places, np.float64, len(images)), images.index)


def _rank(places: pd.Series, labels: pd.Series) -> pd.Series:
    """Return each image's rank in its class, from 1."""
    return places.groupby(labels).rank(method="first")


def _check_classes(images: pd.DataFrame, source: str) -> None:
    classes = {split: set(labels) for split, labels in images.groupby("split")["label"]}
    train, val, test = (classes.get(split, set()) for split in ("train", "val", "test"))
    if len(train) < 2:
        raise UserError(_too_few_classes(images[images["split"] == "train"], source))
    for split, labels in (("val", val), ("test", test)):
        if not labels:
            raise UserError(
                f"There are no images for {split}: none is given, and no class has one to spare. "
                "Add training images."
            )
    unknown = sorted((test | val) - train)
    if unknown:
        raise UserError(
            f"These classes have val or test images but no training images: {', '.join(unknown)}. "
            "Add some, or take the classes out."
        )


def _too_few_classes(train: pd.DataFrame, source: str) -> str:
    """Say that train has one class or none, and where the classes may lie instead."""
    if train.empty:
        return f"{source} has no training image that can be read. Add some for each class."
    label = train["label"].iloc[0]
    told = f"The training images of {source} are all of one class, {label}: nothing can be learnt."
    for source_id in values(train["source_id"]):
        *folders, _ = source_id.split("/")
        if label in folders[:-1] and not is_own(source):
            # Folders within a class are the class's, or `source` is one level too high.
            class_folder = folders[: folders.index(label) + 1]
            return (
                f"{told} That folder holds folders, such as {folders[len(class_folder)]}: if they "
                f"are the classes, or train and test, give {PurePosixPath(source, *class_folder)} "
                "instead."
            )
    return f"{told} Give a folder that holds a folder for each class."
