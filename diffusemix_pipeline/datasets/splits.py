"""Which image is for training, which for choosing, which for judging: by class, from a seed."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from diffusemix_pipeline.datasets.items import Item
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.settings import Source


def assign_splits(items: Sequence[Item], source: Source, seed: int) -> list[Item]:
    """Return the items that are used, each with its split; a source's own splits are kept.

    Where there is no test, about `test_fraction` of each class is held out, where there is no val,
    about `val_fraction` of what then is train; `train_per_class` thins train last. Whether an image
    is held out follows from its content alone: neither names, order nor new images move it. Only
    where no image of a class would be held out, the nearest one is, and a class's last training
    image never is.

    Raises UserError for fewer than two classes, for val or test without images, and for a class
    that has no training image.
    """
    present = {item.split for item in items}
    used = [replace(item, split=item.split or "train") for item in items]
    if "test" not in present:
        used = _hold_out(used, "test", source.test_fraction, seed)
    if "val" not in present:
        used = _hold_out(used, "val", source.val_fraction, seed)
    used = thin_train(used, source.train_per_class, seed)
    _check_classes(used)
    return used


def _hold_out(items: Sequence[Item], split: str, fraction: float, seed: int) -> list[Item]:
    held: set[str] = set()
    for train in _train_by_class(items, split, seed).values():
        below = [item for item in train if _place(item, split, seed) < fraction]
        held.update(item.source_id for item in (below or train[:1])[: len(train) - 1])
    return [replace(item, split=split) if item.source_id in held else item for item in items]


def thin_train(items: Sequence[Item], most: int | None, seed: int) -> list[Item]:
    """Keep at most `most` training images a class, drawn from the seed; all where it is None."""
    if most is None:
        return list(items)
    by_class = _train_by_class(items, "few-shot", seed).values()
    kept = {item.source_id for train in by_class for item in train[:most]}
    return [item for item in items if item.split != "train" or item.source_id in kept]


def _train_by_class(items: Sequence[Item], purpose: str, seed: int) -> dict[str, list[Item]]:
    by_class: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        if item.split == "train":
            by_class[item.label].append(item)
    for train in by_class.values():
        train.sort(key=lambda item: _place(item, purpose, seed))
    return by_class


def _place(item: Item, purpose: str, seed: int) -> float:
    """Return an image's place in [0, 1) in the draw for `purpose`."""
    return seed_from(seed, purpose, item.sha256) / 2**63


def _check_classes(items: Sequence[Item]) -> None:
    classes: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        classes[item.split or ""].add(item.label)
    if len(classes["train"]) < 2:
        raise UserError("The training images have fewer than two classes: nothing can be learnt.")
    for split in ("val", "test"):
        if not classes[split]:
            raise UserError(
                f"There are no images for {split}: none is given, and no class has one to spare. "
                "Add training images."
            )
    unknown = sorted((classes["test"] | classes["val"]) - classes["train"])
    if unknown:
        raise UserError(
            f"These classes have val or test images but no training images: {', '.join(unknown)}. "
            "Add some, or take the classes out."
        )
