"""A sheet of all corruptions, as docs/report.md shows it: a row a family, severities side by side.

    python -m benchmarks.corruptions OUT.png [--image PHOTO] [--sizes 224,64,32]

Without a photograph it is scikit-learn's flower.
"""

import argparse
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image

from diffusemix_pipeline.datasets.images import MAX_PIXELS, read_rgb, to_square
from diffusemix_pipeline.evaluation.corruptions import corrupt
from diffusemix_pipeline.pictures import contact_sheet
from diffusemix_pipeline.settings import Corruption

_SEVERITIES = range(1, 6)
_CELL = 80


def sheet(image: Image.Image, sizes: list[int]) -> bytes:
    """Return a PNG: a row a family, of each size first the image and then the five severities."""
    squares = [to_square(image, size) for size in sizes]
    rows = [
        [
            shown
            for square in squares
            for shown in (
                square,
                *(corrupt(square[None], family, s, ["sheet"], 0)[0] for s in _SEVERITIES),
            )
        ]
        for family in get_args(Corruption)
    ]
    titles = [title for size in sizes for title in (f"{size} px", *map(str, _SEVERITIES))]
    names = [family.replace("_", " ") for family in get_args(Corruption)]
    return contact_sheet(rows, row_labels=names, column_labels=titles, cell=_CELL)


def _flower() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(np.asarray(load_sample_image("flower.jpg")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--sizes", default="224,64,32", help="sides in px")
    options = parser.parse_args()
    image = read_rgb(options.image, MAX_PIXELS) if options.image else _flower()
    options.out.write_bytes(sheet(image, [int(size) for size in options.sizes.split(",")]))
