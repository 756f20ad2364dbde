"""Evidence: what evaluate keeps, that batches change nothing, and that files come back whole."""

import dataclasses
import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from trained_digits import SIDE, accuracy, digits, digits_model

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation import evidence as evidence_module
from diffusemix_pipeline.evaluation.attacks import fgsm, gradient, survives_autoattack
from diffusemix_pipeline.evaluation.corruptions import corrupt
from diffusemix_pipeline.evaluation.evidence import Evidence, ask_and_keep, evaluate
from diffusemix_pipeline.settings import Evaluation
from diffusemix_pipeline.training.data import DecodedImages, LabelledImages

EVALUATION = Evaluation(
    fgsm_epsilons=[8, 2],
    corruptions=["gaussian_noise", "contrast"],
    severities=[5, 1],
    attack_images=30,
    autoattack_images=0,
    batch_size=50,
)
WITH_AUTOATTACK = EVALUATION.model_copy(update={"autoattack_images": 8})  # seconds a time
IDS = [f"image-{number}" for number in range(120)]


def judged_images() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = digits()[1]
    return (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy(), labels.numpy()


def judged(count: int = 120) -> LabelledImages:
    images, labels = judged_images()
    with tempfile.TemporaryDirectory() as folder:
        decoded = DecodedImages(images[:count], SIDE, Path(folder))
    return LabelledImages(decoded, labels[:count], IDS[:count])


@pytest.fixture
def ask(tmp_path):
    """Ask models, or the trained one by itself, whose evidence is returned."""

    def asked(evaluation: Evaluation = EVALUATION, models=None, **more):
        partial = {name: tmp_path / name for name in models or ["it"]}
        given = models or {"it": digits_model()}
        found = dict(evaluate(given, judged(), evaluation, 3, "cpu", partial=partial, **more))
        for folder in partial.values():
            shutil.rmtree(folder, ignore_errors=True)  # as whoever has the answers does
        return found if models else found["it"]

    return asked


def test_answers_are_those_of_the_model(ask):
    evidence = ask()
    pixels, labels = digits()[1]
    model = digits_model()
    assert evidence.probabilities.shape == (120, 10)
    assert evidence.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert evidence.correct.mean() == pytest.approx(accuracy(model, pixels, labels))
    assert evidence.epsilons == (2, 8)
    slope, _ = gradient(model, pixels, labels)
    attacked = accuracy(model, fgsm(pixels, slope, 8 / 255), labels)
    assert evidence.fgsm.mean(axis=1)[1] == pytest.approx(attacked)
    assert evidence.severities == (1, 5)
    images, _ = judged_images()
    noisy = corrupt(images, "gaussian_noise", 5, IDS, 3)
    as_tensor = torch.from_numpy(noisy).permute(0, 3, 1, 2) / 255
    assert evidence.corrupted[0, 1].mean() == pytest.approx(accuracy(model, as_tensor, labels))


def test_costly_attacks_are_tried_on_the_same_few_images_by_their_ids(ask):
    evidence = ask(WITH_AUTOATTACK)
    assert len(set(evidence.attacked)) == len(evidence.pgd) == 30
    assert len(evidence.autoattack) == 8
    assert evidence.attack_epsilon in evidence.epsilons
    assert not (evidence.pgd & ~evidence.correct[evidence.attacked]).any()
    assert not (evidence.autoattack & ~evidence.pgd[:8]).any()
    one_step = evidence.fgsm[evidence.epsilons.index(evidence.attack_epsilon), evidence.attacked]
    assert evidence.pgd.sum() <= one_step.sum()
    fewer = ask(EVALUATION.model_copy(update={"attack_images": 12}))
    assert list(fewer.attacked) == list(evidence.attacked[:12])
    assert list(fewer.pgd) == list(evidence.pgd[:12])
    assert not fewer.autoattack.size


def test_models_asked_together_answer_as_by_themselves(ask):
    other = digits_model()
    with torch.no_grad():
        other[0].weight[0] = 0
    together = ask(models={"it": digits_model(), "other": other})
    for name, model in (("it", digits_model()), ("other", other)):
        alone = ask(models={name: model})[name]
        for field in dataclasses.fields(Evidence):
            answers = getattr(alone, field.name), getattr(together[name], field.name)
            assert np.array_equal(*answers), field.name
    assert (together["it"].corrupted != together["other"].corrupted).any()


def test_what_autoattack_found_before_a_cut_off_is_not_asked_again(ask, monkeypatch):
    monkeypatch.setattr(evidence_module, "_AUTOATTACKED_AT_ONCE", 3)
    asked = []

    def cut_off_at_third(*given):
        asked.append(len(given[1]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return survives_autoattack(*given)

    monkeypatch.setattr(evidence_module, "survives_autoattack", cut_off_at_third)
    with pytest.raises(KeyboardInterrupt):
        ask(WITH_AUTOATTACK)
    resumed = ask(WITH_AUTOATTACK)
    assert asked == [3, 3, 2, 2]  # the third is asked for again, the first two are not
    monkeypatch.undo()
    monkeypatch.setattr(evidence_module, "_AUTOATTACKED_AT_ONCE", 3)
    undisturbed = ask(WITH_AUTOATTACK, models={"anew": digits_model()})["anew"]
    assert np.array_equal(resumed.autoattack, undisturbed.autoattack)


def test_damaged_partial_answers_are_asked_for_anew(tmp_path):
    models, partial = {"it": digits_model()}, {"it": tmp_path}
    evaluation = EVALUATION.model_copy(update={"autoattack_images": 2})
    asked = models, judged(), evaluation, 3, "cpu"
    [(_, undisturbed)] = evaluate(*asked, partial=partial)
    for file in tmp_path.iterdir():
        file.write_bytes(b"junk")
    [(_, again)] = evaluate(*asked, partial=partial)
    assert {file.name for file in tmp_path.iterdir()} == {
        "gaussian_noise.npz",
        "contrast.npz",
        "autoattack-000000.npz",
    }
    assert np.array_equal(again.corrupted, undisturbed.corrupted)
    assert np.array_equal(again.autoattack, undisturbed.autoattack)


def test_families_that_were_asked_about_before_a_cut_off_are_not_asked_again(ask, monkeypatch):
    undisturbed = ask()
    seen = []

    def cut_off_at_contrast(images, family, *given):
        if family == "contrast" and "cut off" not in seen:
            seen.append("cut off")
            raise KeyboardInterrupt
        seen.append(family)
        return corrupt(images, family, *given)

    monkeypatch.setattr(evidence_module, "corrupt", cut_off_at_contrast)
    with pytest.raises(KeyboardInterrupt):
        ask()
    resumed = ask()
    assert set(seen[: seen.index("cut off")]) == {"gaussian_noise"}
    assert set(seen[seen.index("cut off") + 1 :]) == {"contrast"}
    assert np.array_equal(resumed.corrupted, undisturbed.corrupted)


def test_answers_are_kept_each_in_its_folder_and_nothing_beside_it(ask, tmp_path):
    folders = {"it": tmp_path / "kept" / "it"}
    models = {"it": digits_model()}
    ask_and_keep(models, folders, judged(), EVALUATION, 3, "cpu", aside=tmp_path / "aside")
    kept, asked = Evidence.load(folders["it"]), ask()
    for field in dataclasses.fields(Evidence):
        assert np.array_equal(getattr(kept, field.name), getattr(asked, field.name)), field.name
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["it"]


def test_batches_change_no_answer(ask):
    whole, small = ask(), ask(EVALUATION.model_copy(update={"batch_size": 7}))
    assert (whole.fgsm == small.fgsm).all()
    assert (whole.corrupted == small.corrupted).all()
    assert whole.probabilities == pytest.approx(small.probabilities, abs=1e-5)


def test_progress_ends_at_its_total(ask):
    told = {"Evaluating images": [], "AutoAttack": []}

    def tell(description: str, done: int, total: int) -> None:
        told[description].append((done, total))

    ask(WITH_AUTOATTACK, progress=tell)
    passes = 120 * 7 + 30 * 20
    assert told["Evaluating images"][-1] == (passes, passes)
    assert told["AutoAttack"] == [(0, 8), (8, 8)]
    for steps in told.values():
        assert steps == sorted(steps)


def test_evidence_comes_back_from_its_file(ask, tmp_path):
    evidence = ask(WITH_AUTOATTACK)
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


def test_missing_torn_and_pickled_evidence_is_refused(ask, tmp_path):
    with pytest.raises(UserError, match=f"is not there. Remove {tmp_path} and run again"):
        Evidence.load(tmp_path)
    ask().save(tmp_path)
    file = tmp_path / "evidence.npz"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="is damaged"):
        Evidence.load(tmp_path)
    pickled = io.BytesIO()
    np.savez(pickled, ids=np.array([{"a": 1}], dtype=object))
    file.write_bytes(pickled.getvalue())
    with pytest.raises(UserError, match="is damaged"):
        Evidence.load(tmp_path)


def flipped(content: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """Yield `content` with another byte at each of some places."""
    for place in places:
        for mask in (0x01, 0xFF):
            other = bytearray(content)
            other[place] ^= mask
            yield bytes(other)


def test_whichever_byte_is_another_evidence_is_the_same_or_refused(ask, tmp_path):
    evidence = ask()
    evidence.save(tmp_path)
    file = tmp_path / "evidence.npz"
    content = file.read_bytes()
    # Headers of the archive lie at both ends of its parts; within one, all bytes are alike.
    places = {*range(0, len(content), 211), *range(100), *range(len(content) - 900, len(content))}
    refused = 0
    for damaged in flipped(content, places):
        file.write_bytes(damaged)
        try:
            loaded = Evidence.load(tmp_path)
        except UserError as error:
            assert f"Remove {tmp_path} and run again" in str(error)
            refused += 1
            continue
        for field in dataclasses.fields(Evidence):
            assert np.array_equal(getattr(loaded, field.name), getattr(evidence, field.name))
    assert refused > len(places)


def test_whichever_byte_of_kept_answers_is_another_they_are_whole_or_asked_anew(tmp_path):
    file, right = tmp_path / "fog.npz", np.arange(240).reshape(2, 120) % 3 == 0
    asked = []

    def ask_anew() -> dict[str, np.ndarray]:
        asked.append("it")
        return {"it": right}

    kept = evidence_module._kept({"it": file}, ask_anew)
    assert evidence_module._kept({"it": file}, ask_anew)["it"].tolist() == kept["it"].tolist()
    assert asked == ["it"]
    content = file.read_bytes()
    for damaged in flipped(content, range(len(content))):
        file.write_bytes(damaged)
        found = evidence_module._kept({"it": file}, ask_anew)["it"]
        assert found.dtype == right.dtype
        assert np.array_equal(found, right)
    assert len(asked) > len(content)


def test_no_test_images_is_an_error_that_names_the_setting():
    with pytest.raises(UserError, match="test_fraction"):
        list(evaluate({}, judged(0), EVALUATION, 0, "cpu", partial={}))
