"""What MLflow runs when a registered classifier is loaded: raw images in, a table of answers out.

MLflow keeps a copy of this file beside the weights ("models from code") and executes that copy.
What belongs here: telling inputs apart. What does not: decoding, resizing and the network, which
are the classifier's (`training/classifier.py`).
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image


class LoggedClassifier(PythonModel):
    """A classifier that takes images as they are."""

    def load_context(self, context: Any) -> None:
        """Read the classifier, with the installed package or else the copy kept with the model."""
        if importlib.util.find_spec("diffusemix_pipeline") is None:
            sys.path.append(context.artifacts["code"])
        from diffusemix_pipeline.training.classifier import load_classifier

        self.classifier = load_classifier(Path(context.artifacts["classifier"]))

    # MLflow makes a schema of most type hints, refuses what differs from it, and warns where there
    # is no hint. Of an array it makes none.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> pd.DataFrame:
        """Return a row an image: `label`, and `p(<class>)` for each class.

        `model_input` is uint8 pixels (N, H, W, 3), a list of such images of any sizes, a list of
        image files, or a data frame with a column `path`.
        """
        items: Any = model_input["path"] if isinstance(model_input, pd.DataFrame) else model_input
        images = [self.classifier.prepare(_image(item)) for item in items]
        probabilities = self.classifier.predict_proba(np.stack(images))
        table = pd.DataFrame(probabilities, columns=[f"p({c})" for c in self.classifier.classes])
        labels = [self.classifier.classes[index] for index in probabilities.argmax(axis=1)]
        table.insert(0, "label", labels)
        return table


def _image(item: Any) -> str | Image.Image:
    if isinstance(item, str | Path):
        return str(item)
    given = np.asarray(item)
    pixels = given.astype(np.uint8)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not np.array_equal(pixels, given):
        raise ValueError("an image is whole numbers from 0 to 255 in the shape (height, width, 3)")
    return Image.fromarray(pixels)


set_model(LoggedClassifier())
