"""A classifier as MLflow serves it: raw images in, a table of answers out.

What belongs here: telling inputs apart. What does not: decoding, resizing and the network, which
are the classifier's (`classifier.py`), and MLflow, which calls `_load_pyfunc` by its name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from diffusemix_pipeline.training.classifier import Classifier, load_classifier


@dataclass(frozen=True)
class ServedClassifier:
    """A classifier that takes images as they are."""

    classifier: Classifier

    def predict(self, images: Any) -> pd.DataFrame:
        """Return a row an image: `label`, and `p(<class>)` for each class.

        `images` is uint8 pixels (N, H, W, 3), a list of such images of any sizes, a list of image
        files, or a data frame with a column `path`. Raises ValueError for pixels of another kind.
        """
        items = images["path"] if isinstance(images, pd.DataFrame) else images
        prepared = [self.classifier.prepare(_image(item)) for item in items]
        probabilities = self.classifier.predict_proba(np.stack(prepared))
        table = pd.DataFrame(probabilities, columns=[f"p({c})" for c in self.classifier.classes])
        labels = [self.classifier.classes[index] for index in probabilities.argmax(axis=1)]
        table.insert(0, "label", labels)
        return table


def _load_pyfunc(folder: str) -> ServedClassifier:
    return ServedClassifier(load_classifier(Path(folder)))


def _image(item: Any) -> str | Image.Image:
    if isinstance(item, str | Path):
        return str(item)
    given = np.asarray(item)
    pixels = given.astype(np.uint8)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not np.array_equal(pixels, given):
        raise ValueError("an image is whole numbers from 0 to 255 in the shape (height, width, 3)")
    return Image.fromarray(pixels)
