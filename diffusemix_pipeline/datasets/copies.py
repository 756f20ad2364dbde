"""Pictures that lie in two splits: equal pixels, or nearly so, as the same photograph saved anew.

A near-copy is told by the picture in grey at 8 x 8 px, less its mean: re-encoding, another size and
a little more light leave it as it was. Crops, mirrored and rotated pictures are not found.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from diffusemix_pipeline.datasets.items import Item

# Between different pictures, the greatest correlation was 0.9964 (1,797 digits) and 0.9899 (6,000
# of CIFAR-10). Of their copies as JPEG of quality 50, 95 % had more than 0.998, and of those of
# half the size 0.9997.
_NEAR = 0.997
_SIDE = 8
_COMPARED = 512  # images at a time


def outline(image: Image.Image) -> bytes:
    """Return 64 bytes of an RGB picture, by which near-copies are told."""
    return image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX).tobytes()


def copies_across_splits(items: Sequence[Item]) -> list[dict[str, str]]:
    """List the images of train that val or test hold too, or nearly, and those of val in test.

    Each has `split`, `image` and `held_out`: the image that is the most like it.
    """
    return [*_copies(items, "train", {"val", "test"}), *_copies(items, "val", {"test"})]


def _copies(items: Sequence[Item], split: str, others: set[str]) -> Iterator[dict[str, str]]:
    ours = [item for item in items if item.split == split]
    held_out = [item for item in items if item.split in others]
    if not held_out:
        return
    same = {item.pixels: item for item in held_out}
    theirs = _outlines(held_out)
    for start in range(0, len(ours), _COMPARED):
        batch = ours[start : start + _COMPARED]
        alike = _outlines(batch) @ theirs.T
        for item, nearest, likeness in zip(batch, alike.argmax(1), alike.max(1), strict=True):
            copy = same.get(item.pixels) or (held_out[nearest] if likeness > _NEAR else None)
            if copy:
                yield {"split": split, "image": item.source_id, "held_out": copy.source_id}


def _outlines(items: Sequence[Item]) -> np.ndarray:
    """Return float32 (N, 64), each of mean 0 and length 1; a flat picture is 0, like no other."""
    raw = np.frombuffer(b"".join(item.outline for item in items), np.uint8)
    grey = raw.reshape(len(items), -1).astype(np.float32)
    grey -= grey.mean(axis=1, keepdims=True)
    length = np.linalg.norm(grey, axis=1, keepdims=True)
    return np.where(length > 0, grey / np.maximum(length, 1e-6), 0)
