"""Evidence: what evaluate keeps, that batches change nothing, and that files come back whole."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from trained_digits import accuracy, digits, digits_model

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.attacks import fgsm
from diffusemix_pipeline.evaluation.corruptions import corrupt
from diffusemix_pipeline.evaluation.evidence import Evidence, evaluate
from diffusemix_pipeline.settings import Evaluation

EVALUATION = Evaluation(
    fgsm_epsilons=[8, 2],
    corruptions=["gaussian_noise", "contrast"],
    severities=[5, 1],
    batch_size=50,
)
IDS = [f"image-{number}" for number in range(120)]


def judged_images() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = digits()[1]
    return (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy(), labels.numpy()


def evidence_of(evaluation: Evaluation = EVALUATION, **more) -> Evidence:
    images, labels = judged_images()
    return evaluate(digits_model(), images, labels, IDS, evaluation, 3, "cpu", **more)


def test_answers_are_those_of_the_model():
    evidence = evidence_of()
    pixels, labels = digits()[1]
    model = digits_model()
    assert evidence.probabilities.shape == (120, 10)
    assert evidence.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert evidence.correct.mean() == pytest.approx(accuracy(model, pixels, labels))
    assert evidence.epsilons == (2, 8)
    attacked = accuracy(model, fgsm(model, pixels, labels, 8 / 255), labels)
    assert evidence.fgsm.mean(axis=1)[1] == pytest.approx(attacked)
    assert evidence.severities == (1, 5)
    images, _ = judged_images()
    noisy = corrupt(images, "gaussian_noise", 5, IDS, 3)
    as_tensor = torch.from_numpy(noisy).permute(0, 3, 1, 2) / 255
    assert evidence.corrupted[0, 1].mean() == pytest.approx(accuracy(model, as_tensor, labels))


def test_batches_change_no_answer():
    whole, small = evidence_of(), evidence_of(EVALUATION.model_copy(update={"batch_size": 7}))
    assert (whole.fgsm == small.fgsm).all()
    assert (whole.corrupted == small.corrupted).all()
    assert whole.probabilities == pytest.approx(small.probabilities, abs=1e-5)


def test_progress_ends_at_its_total():
    told = []
    evidence_of(progress=lambda description, done, total: told.append((done, total)))
    assert told[-1] == (120 * 7, 120 * 7)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_evidence_comes_back_from_its_file(tmp_path):
    evidence = evidence_of()
    evidence.save(tmp_path)
    loaded = Evidence.load(tmp_path)
    for field in dataclasses.fields(Evidence):
        saved, back = getattr(evidence, field.name), getattr(loaded, field.name)
        assert type(saved) is type(back)
        assert np.array_equal(saved, back)
        assert getattr(saved, "dtype", None) == getattr(back, "dtype", None)
    content = (tmp_path / "evidence.npz").read_bytes()
    evidence.save(tmp_path)
    assert (tmp_path / "evidence.npz").read_bytes() == content


def test_missing_torn_and_pickled_evidence_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        Evidence.load(tmp_path)
    evidence_of().save(tmp_path)
    file = tmp_path / "evidence.npz"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read"):
        Evidence.load(tmp_path)
    pickled = io.BytesIO()
    np.savez(pickled, ids=np.array([{"a": 1}], dtype=object))
    file.write_bytes(pickled.getvalue())
    with pytest.raises(UserError, match="cannot be read"):
        Evidence.load(tmp_path)


def test_no_test_images_is_an_error_that_names_the_setting():
    images, labels = judged_images()
    with pytest.raises(UserError, match="test_fraction"):
        evaluate(digits_model(), images[:0], labels[:0], [], EVALUATION, 0, "cpu")
