"""Audit: a wrong answer leads to the training images that look like it to the classifier."""

import io

import numpy as np
import pytest
import torch
from conftest import quick_settings, write_classes, write_edits
from PIL import Image

from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.evaluation.audit import audit
from diffusemix_pipeline.training.classifier import Classifier, build_classifier
from diffusemix_pipeline.training.data import load_images


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A classifier, its stages and images, and answers of which two are wrong."""
    folder = tmp_path_factory.mktemp("audit")
    source = write_classes(folder / "source", ["cat", "dog"], 30)
    settings = quick_settings("source.test_fraction=0.3", "source.train_per_class=null")
    raw = ingest(str(source), settings, folder / "raw", aside=folder / "aside")
    made = write_edits(raw, folder / "made", aside=folder / "aside")
    torch.manual_seed(0)
    classifier = build_classifier("resnet10t", ["cat", "dog"], 32)
    train, test = (
        load_images([raw], split, classifier.classes, 32, aside=folder)
        for split in ("train", "test")
    )
    right = np.where(np.eye(2)[test.labels] == 1, 0.7, 0.3)
    right[3] = right[3][::-1]
    right[5] = [0.05, 0.95] if test.labels[5] == 0 else [0.95, 0.05]
    return classifier, right, test, train, raw, made


def test_the_surest_wrong_answers_come_first_with_what_was_made_of_their_neighbours(judged):
    classifier, answers, test, _, raw, made = judged
    found = audit(*judged, pictured=True, device="cpu")
    assert [case["confidence"] for case in found.cases] == [0.95, 0.7]
    rows = raw.manifest().set_index("image_id")
    of_source = made.manifest().groupby("source_id")["image_id"].agg(list)
    for case, place in zip(found.cases, (5, 3), strict=True):
        assert rows.loc[case["image"], "sha256"] == test.ids[place]
        assert rows.loc[case["image"], "split"] == "test"
        assert case["label"] != case["answer"] == classifier.classes[answers[place].argmax()]
        for near in case["nearest"]:
            assert rows.loc[near["image"], "split"] == "train"
            assert rows.loc[near["image"], "label"] == near["label"]
            assert near["made"] == of_source[near["image"]]


def test_the_picture_has_no_column_without_an_image(judged):
    """One edit an image was made, so each neighbour takes two columns, not three."""
    cell, gap = 64, 4
    sheet = np.asarray(Image.open(io.BytesIO(audit(*judged, pictured=True, device="cpu").sheet)))
    below_titles = sheet[-2 * (cell + gap) :]
    for column in range(1, 8):  # from the right: test image, and three times two
        end = sheet.shape[1] - gap - (column - 1) * (cell + gap)
        assert (below_titles[:cell, end - cell : end] < 250).any(axis=2).mean() > 0.2


def test_neighbours_are_nearest_by_the_cosine_of_the_last_features(judged):
    classifier, _, test, train, raw, _ = judged
    features = [classifier.features(images) for images in (test.images[5:6], train.images[:])]
    one, all_ = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in features)
    cosines = (one @ all_.T)[0]
    case = audit(*judged, pictured=True, device="cpu").cases[0]
    assert [n["similarity"] for n in case["nearest"]] == pytest.approx(
        sorted(cosines, reverse=True)[:3], abs=1e-5
    )
    ids = raw.manifest().set_index("image_id")["sha256"]
    found = [ids[near["image"]] for near in case["nearest"]]
    assert found == [train.ids[place] for place in np.argsort(-cosines)[:3]]
    with torch.no_grad():  # they are what the last layer turns into logits
        logits = classifier.model.backbone.get_classifier()(torch.from_numpy(features[0]))
    probabilities = logits.softmax(1).numpy()
    assert probabilities == pytest.approx(classifier.predict_proba(test.images[5:6]), abs=1e-5)


def test_where_all_is_right_there_is_nothing_to_trace(judged):
    classifier, _, test, *rest = judged
    assert (
        audit(classifier, np.eye(2)[test.labels], test, *rest, pictured=True, device="cpu") is None
    )


@pytest.mark.parametrize("model", ["resnet10t", "vit_tiny_patch16_224", "preact_resnet18"])
def test_each_kind_of_model_has_features(model):
    classifier: Classifier = build_classifier(model, ["a", "b"], 32)
    classifier.model.eval()
    features = classifier.features(np.zeros((3, 32, 32, 3), np.uint8))
    assert features.shape[0] == 3
    assert features.ndim == 2
