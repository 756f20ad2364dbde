"""Audit by sample: from a wrong answer on test to the training images that it may come from.

What belongs here: which wrong answers, which training images are nearest to each in the
classifier's own eyes, and what was made of these. What does not: taking them out (`drop`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.pictures import contact_sheet
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.training.classifier import Classifier
from diffusemix_pipeline.training.data import LabelledImages, ordered_rows

_MOST = 6
_NEAREST = 3
_MADE_SHOWN = 2  # of each nearest image
_CELL = 64  # px
_BATCH = 256
_LEAST = 1e-12


@dataclass(frozen=True)
class Audit:
    """Wrong answers, the surest first, and a picture of them."""

    cases: list[dict[str, Any]]
    """A case has image, label, answer and confidence, and under nearest, for each of the nearest
    training images: image, label, similarity (cosine, -1 to 1), and made: ids of its images."""
    sheet: bytes | None
    """A PNG: a row a case, of the test image, then each nearest image and some made of it; None
    where there is to be no picture."""


def audit(
    classifier: Classifier,
    probabilities: np.ndarray,
    test: LabelledImages,
    train: LabelledImages,
    raw: Stage,
    augmented: Stage,
    *,
    pictured: bool,
    device: str,
    progress: Progress = silent,
) -> Audit | None:
    """Trace the six surest wrong answers, with a picture if `pictured`; None where all are right.

    `probabilities` float (N, C) are the classifier's on `test`; `train` holds the original training
    images, in the order of `load_images`. Nearness is the cosine of the features before the last
    layer.
    """
    answers = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(answers != test.labels)
    wrong = wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:_MOST]
    if not len(wrong):
        return None
    classifier.model.to(device).eval()
    near, alike = _nearest(classifier, test.images[wrong], train, progress)
    trained, tested = (
        _named(raw, split, images, classifier)
        for split, images in (("train", train), ("test", test))
    )
    sources = {trained[place][0] for place in near.flat}
    made = augmented.manifest(["image_id", "source_id", "file_name"])
    made = made[made["source_id"].isin(sources)].set_index("image_id")
    named_answers = [classifier.classes[answer] for answer in answers]
    confidence = probabilities.max(axis=1)
    cases = _cases(wrong, tested, named_answers, confidence, near, alike, trained, made)
    names_of_made = made["file_name"]

    def read(image_id: str, size: int) -> np.ndarray:
        return augmented.files.pixels(names_of_made[image_id], size)

    sheet = _sheet(cases, test.images[wrong], train, near, read) if pictured else None
    return Audit(cases, sheet)


def _named(
    raw: Stage, split: str, images: LabelledImages, classifier: Classifier
) -> list[tuple[str, str]]:
    """Return the id and the class of each image of a split."""
    ids = ordered_rows(raw, split, ["image_id"])["image_id"]
    labels = (classifier.classes[label] for label in images.labels)
    return list(zip(ids, labels, strict=True))


def _cases(
    wrong: np.ndarray,
    tested: Sequence[tuple[str, str]],
    answers: Sequence[str],
    confidence: np.ndarray,
    near: np.ndarray,
    alike: np.ndarray,
    trained: Sequence[tuple[str, str]],
    made: pd.DataFrame,
) -> list[dict[str, Any]]:
    """Return `Audit.cases` of the W places `wrong` among the test images.

    `tested` and `trained` hold ids and classes; `near` and `alike`, (W, n), the places of the
    nearest training images and their cosines; `made` the source of each augmented image, by id.
    """
    made_of = made.groupby("source_id").groups
    cases = []
    for place, neighbours, cosines in zip(wrong, near, alike, strict=True):
        nearest = [
            {
                "image": trained[neighbour][0],
                "label": trained[neighbour][1],
                "similarity": float(cosine),
                "made": list(made_of.get(trained[neighbour][0], [])),
            }
            for neighbour, cosine in zip(neighbours, cosines, strict=True)
        ]
        image, label = tested[place]
        sure = float(confidence[place])
        cases.append(
            {
                "image": image,
                "label": label,
                "answer": answers[place],
                "confidence": sure,
                "nearest": nearest,
            }
        )
    return cases


def _nearest(
    classifier: Classifier, images: np.ndarray, train: LabelledImages, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Return the places int (W, n) of the training images nearest to W images, and the cosines."""
    asked = _directions(classifier, images)
    alike: np.ndarray = np.empty((len(images), 0), np.float32)
    places: np.ndarray = np.empty((len(images), 0), np.int64)
    for start in range(0, len(train), _BATCH):
        batch = _directions(classifier, train.images[start : start + _BATCH])
        alike = np.hstack([alike, asked @ batch.T])
        ours = np.tile(np.arange(start, start + len(batch)), (len(images), 1))
        places = np.hstack([places, ours])
        best = np.argsort(-alike, axis=1, kind="stable")[:, :_NEAREST]
        alike, places = (np.take_along_axis(each, best, 1) for each in (alike, places))
        progress("Tracing wrong answers", min(start + _BATCH, len(train)), len(train))
    return places, alike


def _directions(classifier: Classifier, images: np.ndarray) -> np.ndarray:
    """Return the features float32 (N, F) of uint8 (N, S, S, 3) images, each of length 1."""
    features = classifier.features(images)
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=_LEAST)


def _sheet(
    cases: Sequence[dict[str, Any]],
    images: np.ndarray,
    train: LabelledImages,
    near: np.ndarray,
    read: Callable[[str, int], np.ndarray],
) -> bytes:
    blank = np.full((1, 1, 3), 255, np.uint8)
    most = max(len(neighbour["made"]) for case in cases for neighbour in case["nearest"])
    columns = min(most, _MADE_SHOWN)
    rows = []
    for case, image, places in zip(cases, images, near, strict=True):
        row = [image]
        for neighbour, pixels in zip(case["nearest"], train.images[places], strict=True):
            shown = [read(made, len(image)) for made in neighbour["made"][:columns]]
            row += [pixels, *shown, *[blank] * (columns - len(shown))]
        rows.append(row)
    made = ["made of it"] * columns
    titles = [title for n, _ in enumerate(near[0], 1) for title in (f"nearest {n}", *made)]
    return contact_sheet(
        rows,
        row_labels=[f"{c['label']}, taken for {c['answer']}" for c in cases],
        column_labels=["test image", *titles],
        cell=_CELL,
    )
