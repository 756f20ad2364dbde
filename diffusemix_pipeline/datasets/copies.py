"""Pictures that lie in two splits: equal pixels, or nearly so, as the same photograph saved anew.

A near-copy is told by the picture in grey at 8 x 8 px: re-encoding, another size and a little more
light leave it as it was. Two pictures must be alike in that, and be so still when what all others
have in common is taken off, for pictures of one make, such as X-rays, share most of what they show.
Crops, mirrored and rotated pictures are not found.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from PIL import Image

from diffusemix_pipeline.datasets.checked import Checked

# Correlations of outlines. Different pictures: at most 0.9964 (1,797 digits) and 0.9838 (4,000 of
# CIFAR-10); of 200 made radiographs with a lesion each, 191 have more than 0.997 with another, but
# two more than 0.995 less what is common. Of copies (JPEG of quality 50, half the size, a tenth
# more light) 96 to 98 % of CIFAR-10, all of 600 flowers but one and 92 % of the radiographs have
# both; of the JPEG files of noisy ones of 96 px two thirds.
_NEAR = 0.997
_NEAR_BUT_FOR_THE_COMMON = 0.995
_REACH = (2 - 2 * _NEAR) ** 0.5 + 1e-3  # how far apart two such of length 1 are, with rounding
_SIDE = 8
_COMPARED = 2**20  # pairs at a time, of this many images at most:
_AT_ONCE = 4096


def outline(image: Image.Image) -> bytes:
    """Return 128 bytes of an RGB picture, by which near-copies are told."""
    grey = image.convert("L").convert("F").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(grey, np.float16).tobytes()


def copies_across_splits(images: pd.DataFrame, checked: Checked) -> list[dict[str, str]]:
    """List the images of train that val or test hold too, or nearly, and those of val in test.

    `images` has a row an image, with `source_id`, `split`, `sha256` and `pixels`; `checked` knows
    their outlines. Each that is found has `split`, `image` and `held_out`: the image that is the
    most like it, or any of several that are equally so.
    """
    outlines = checked.outlines(images["sha256"])
    return [
        *_copies(images, outlines, "train", {"val", "test"}),
        *_copies(images, outlines, "val", {"test"}),
    ]


def _copies(
    images: pd.DataFrame, outlines: np.ndarray, split: str, others: set[str]
) -> Iterator[dict[str, str]]:
    is_ours = (images["split"] == split).to_numpy()
    is_held_out = images["split"].isin(others).to_numpy()
    if not is_held_out.any() or not is_ours.any():
        return
    names_and_pixels = images[["source_id", "pixels"]]
    ours, held_out = names_and_pixels[is_ours], names_and_pixels[is_held_out]
    of_pixels = held_out.drop_duplicates("pixels", keep="last").set_index("pixels")["source_id"]
    same = ours["pixels"].map(of_pixels).to_numpy(object)
    near, names = np.full(len(ours), None, object), held_out["source_id"].to_numpy(object)
    my_outlines, theirs = outlines[is_ours], _normed(outlines[is_held_out])
    # Near-copies lie near each other on any line. On the one along which the held-out lie furthest
    # apart, most of the others are too far away to be looked at.
    line = np.linalg.eigh(theirs.T @ theirs)[1][:, -1]
    order = np.argsort(theirs @ line, kind="stable")
    theirs, names = theirs[order], names[order]
    theirs_at, mine_at = theirs @ line, np.empty(len(ours), np.float32)
    step = min(_AT_ONCE, max(1, _COMPARED // len(held_out)))
    total = theirs.sum(axis=0)
    for start in range(0, len(ours), _AT_ONCE):
        mine = _normed(my_outlines[start : start + _AT_ONCE])
        total += mine.sum(axis=0)
        mine_at[start : start + _AT_ONCE] = mine @ line
    others_count = max(1, len(ours) + len(held_out) - 2)
    along = np.argsort(mine_at, kind="stable")
    for start in range(0, len(ours), step):
        some = along[start : start + step]
        first, last = mine_at[some[[0, -1]]]
        low, high = np.searchsorted(theirs_at, [first - _REACH, last + _REACH])
        if low == high:
            continue
        mine, around = _normed(my_outlines[some]), theirs[low:high]
        alike = mine @ around.T
        rows = np.flatnonzero(alike.max(axis=1) > _NEAR)  # few: the rest is for these alone
        nearest = alike[rows].argmax(axis=1)
        pairs = around[nearest]
        common = (total - mine[rows] - pairs) / others_count
        own = (_unit(mine[rows] - common) * _unit(pairs - common)).sum(axis=1)
        is_near = own > _NEAR_BUT_FOR_THE_COMMON
        near[some[rows[is_near]]] = names[low + nearest[is_near]]
    copies = np.where(pd.isna(same), near, same)
    found = np.flatnonzero(pd.notna(copies))
    for image, copy in zip(ours["source_id"].iloc[found], copies[found], strict=True):
        yield {"split": split, "image": image, "held_out": copy}


def _normed(outlines: np.ndarray) -> np.ndarray:
    """Return float32 (N, 64), each of mean 0 and length 1; a flat picture is 0, like no other."""
    return _unit(outlines.astype(np.float32))


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(length > 1e-3, rows / np.maximum(length, 1e-3), 0)
