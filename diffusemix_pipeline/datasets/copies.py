"""Pictures that lie in two splits: equal pixels, or nearly so, as the same photograph saved anew.

A near-copy is told by the picture in grey at 8 x 8 px: re-encoding, another size and a little more
light leave it as it was. Two pictures must be alike in that, and be so still when what all others
have in common is taken off, for pictures of one make, such as X-rays, share most of what they show.
Crops, mirrored and rotated pictures are not found.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from diffusemix_pipeline.datasets.items import Item

# Correlations of outlines. Different pictures: at most 0.9964 (1,797 digits) and 0.9838 (4,000 of
# CIFAR-10); of 200 made radiographs with a lesion each, 191 have more than 0.997 with another, but
# two more than 0.995 less what is common. Of copies (JPEG of quality 50, half the size, a tenth
# more light) 96 to 98 % of CIFAR-10, all of 600 flowers but one and 92 % of the radiographs have
# both; of the JPEG files of noisy ones of 96 px two thirds.
_NEAR = 0.997
_NEAR_BUT_FOR_THE_COMMON = 0.995
_SIDE = 8
_COMPARED = 2**20  # pairs at a time, of this many images at most:
_AT_ONCE = 4096


def outline(image: Image.Image) -> bytes:
    """Return 128 bytes of an RGB picture, by which near-copies are told."""
    grey = image.convert("L").convert("F").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(grey, np.float16).tobytes()


def copies_across_splits(items: Sequence[Item]) -> list[dict[str, str]]:
    """List the images of train that val or test hold too, or nearly, and those of val in test.

    Each has `split`, `image` and `held_out`: the image that is the most like it.
    """
    return [*_copies(items, "train", {"val", "test"}), *_copies(items, "val", {"test"})]


def _copies(items: Sequence[Item], split: str, others: set[str]) -> Iterator[dict[str, str]]:
    ours = [item for item in items if item.split == split]
    held_out = [item for item in items if item.split in others]
    if not held_out or not ours:
        return
    same = {item.pixels: item for item in held_out}
    theirs, step = _outlines(held_out), min(_AT_ONCE, max(1, _COMPARED // len(held_out)))
    batches = [ours[start : start + step] for start in range(0, len(ours), step)]
    total = theirs.sum(axis=0) + sum(_outlines(batch).sum(axis=0) for batch in batches)
    others_count = max(1, len(ours) + len(held_out) - 2)
    for batch in batches:
        mine = _outlines(batch)
        alike = mine @ theirs.T
        nearest = alike.argmax(axis=1)
        pairs = theirs[nearest]
        common = (total - mine - pairs) / others_count
        own = (_unit(mine - common) * _unit(pairs - common)).sum(axis=1)
        near = (alike.max(axis=1) > _NEAR) & (own > _NEAR_BUT_FOR_THE_COMMON)
        for item, place, is_near in zip(batch, nearest, near, strict=True):
            copy = same.get(item.pixels) or (held_out[place] if is_near else None)
            if copy:
                yield {"split": split, "image": item.source_id, "held_out": copy.source_id}


def _outlines(items: Sequence[Item]) -> np.ndarray:
    """Return float32 (N, 64), each of mean 0 and length 1; a flat picture is 0, like no other."""
    raw = np.frombuffer(b"".join(item.outline for item in items), np.float16)
    return _unit(raw.reshape(len(items), -1).astype(np.float32))


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(length > 1e-3, rows / np.maximum(length, 1e-3), 0)
