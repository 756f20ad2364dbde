"""Promises of the gate's teachers: none judges what it saw, and none is trained twice."""

import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from conftest import quick_settings, write_classes
from hypothesis import given
from hypothesis import strategies as st

from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.editing.editor import BUNDLED_WEIGHTS, load_editor
from diffusemix_pipeline.editing.gate import class_thresholds, verdicts
from diffusemix_pipeline.editing.planning import plan_edits
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.training import fold_teachers
from diffusemix_pipeline.training.data import DecodedImages, LabelledImages, load_images
from diffusemix_pipeline.training.fold_teachers import (
    Fitted,
    assign_folds,
    fit_fold_teachers,
    label_gate,
)

CLASSES = ["cat", "dog", "emu"]
FOLDS = "editing.gate.folds=3"


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Stage:
    folder = tmp_path_factory.mktemp("raw")
    source = write_classes(folder / "data", CLASSES, 8)
    settings = quick_settings("source.train_per_class=null")
    return ingest(str(source), settings, folder / "raw", aside=folder / "aside", train_only=True)


def fitted(raw: Stage, folder: Path, *overrides: str) -> Fitted:
    return fit_fold_teachers(
        raw,
        quick_settings(FOLDS, *overrides),
        folder=folder / "teachers",
        aside=folder / "aside",
        device="cpu",
    )


@pytest.fixture(scope="module")
def teachers(raw, tmp_path_factory) -> Fitted:
    return fitted(raw, tmp_path_factory.mktemp("fitted"))


def spy_on_fits(monkeypatch) -> list[LabelledImages]:
    """Return a list that fills with what each teacher was trained on."""
    seen: list[LabelledImages] = []
    fit = fold_teachers.fit

    def told(classifier, train, *args, **how):
        seen.append(train)
        return fit(classifier, train, *args, **how)

    monkeypatch.setattr(fold_teachers, "fit", told)
    return seen


def decoded(raw: Stage, aside: Path) -> LabelledImages:
    return load_images([raw], "train", CLASSES, 32, aside=aside)


def pictures(labels: list[int], contents: list[int]) -> LabelledImages:
    images = np.array(contents, np.uint8)[:, None, None, None].repeat(3, axis=3)
    folder = Path(tempfile.gettempdir())
    return LabelledImages(
        DecodedImages(images, 1, folder), np.array(labels), [f"{n}" for n in range(len(labels))]
    )


def test_no_image_is_judged_by_a_teacher_that_saw_it(raw, tmp_path, monkeypatch):
    seen = spy_on_fits(monkeypatch)
    teachers = fitted(raw, tmp_path)
    train = decoded(raw, tmp_path)
    assert len(seen) == 3
    for fold, trained_on in enumerate(seen):
        of_train = teachers.teachers.fold_of(train.ids)
        judged = {train.ids[row] for row in np.flatnonzero(of_train == fold)}
        assert set(trained_on.ids) == set(train.ids) - judged
        assert set(trained_on.labels) == {0, 1, 2}
        rows = [train.ids.index(image_id) for image_id in trained_on.ids]
        assert trained_on.labels.tolist() == train.labels[rows].tolist()
        assert np.array_equal(trained_on.images[:], train.images[np.array(rows)])
    for row, image_id in enumerate(train.ids):
        fold = teachers.teachers.fold_of([image_id])[0]
        alone = teachers.teachers.teachers[fold].predict_proba(train.images[row : row + 1])
        label = train.labels[row]
        assert teachers.held_out[row] == pytest.approx(alone[0, label], abs=1e-5)
        edit = teachers.teachers.probabilities([image_id], train.images[row : row + 1])
        assert edit[0, label] == teachers.held_out[row]


def test_held_out_probabilities_and_accuracy_are_of_all_training_images(
    raw, teachers, tmp_path, monkeypatch
):
    train = decoded(raw, tmp_path)
    assert teachers.labels.tolist() == train.labels.tolist()
    found = teachers.teachers.probabilities(train.ids, train.images[:])
    assert teachers.held_out.tolist() == found[np.arange(24), train.labels].tolist()
    assert teachers.accuracy == (found.argmax(axis=1) == train.labels).mean()
    monkeypatch.setattr(fold_teachers, "_JUDGED", 7)  # images judged at a time
    own, accuracy = fold_teachers._judge_held_out(
        teachers.teachers, train, teachers.teachers.fold_of(train.ids)
    )
    assert own.tolist() == teachers.held_out.tolist()
    assert accuracy == teachers.accuracy


@hypothesis.settings(max_examples=20, deadline=None)
@given(st.permutations(range(24)), st.integers(1, 24))
def test_probabilities_depend_on_neither_order_nor_neighbours(raw, teachers, order, taken):
    train = decoded(raw, raw.folder.parent / "aside")
    chosen = np.array(order[:taken])
    ids = [train.ids[index] for index in chosen]
    found = teachers.teachers.probabilities(ids, train.images[chosen])
    own = found[np.arange(taken), train.labels[chosen]]
    assert np.array_equal(own, teachers.held_out[chosen])


def test_no_edits_have_no_probabilities(teachers):
    assert teachers.teachers.probabilities([], np.empty((0, 32, 32, 3), np.uint8)).shape == (0, 3)


def test_a_fitted_gate_is_read_back_without_its_images(raw, tmp_path, monkeypatch):
    settings = quick_settings(FOLDS, "editing.gate.enabled=true", "editing.gate.min_change=0")
    plan = plan_edits(raw, settings)
    where = {"folder": tmp_path / "gate", "aside": tmp_path / "aside", "device": "cpu"}
    first = label_gate(plan, raw, **where)
    accuracy = first.fit()
    fitted = fit_fold_teachers(raw, settings, **where | {"folder": tmp_path / "gate" / "teachers"})
    assert not [path for path in (tmp_path / "aside").rglob("*") if path.is_file()]
    monkeypatch.setattr(fold_teachers, "load_images", lambda *args, **how: pytest.fail("decoded"))
    again = label_gate(plan, raw, **where)
    assert again.fit() == accuracy
    sources = [edit.source for edit in plan]
    originals = np.stack([source.read(32) for source in sources])
    edits = originals[:, ::-1]
    found = first.judge(sources, originals, edits)
    assert again.judge(sources, originals, edits) == found
    assert len(set(found)) > 1
    labels = np.array([fitted.teachers.classes.index(source.label) for source in sources])
    probabilities = fitted.teachers.probabilities([s.sha256 for s in sources], edits)
    thresholds = class_thresholds(fitted.held_out, fitted.labels, 3, 0.05)
    rules = settings.editing.gate
    assert found == verdicts(originals, edits, labels, probabilities, thresholds, rules)
    [kept] = (tmp_path / "gate" / "fitted").iterdir()
    with np.load(kept) as arrays:
        assert np.array_equal(arrays["ids"], fitted.teachers.ids)
        assert np.array_equal(arrays["folds"], fitted.teachers.folds)
        assert arrays["folders"].tolist() == list(fitted.folders)
        assert np.array_equal(arrays["thresholds"], thresholds)
    assert accuracy == fitted.accuracy
    strange = sources[0]._replace(sha256="f" * 64)
    assert len(again.judge([strange], originals[:1], edits[:1])) == 1  # by any: none has seen it


def test_what_is_known_of_a_gate_is_named_where_it_is_damaged(raw, tmp_path, monkeypatch):
    settings = quick_settings(FOLDS, "editing.gate.enabled=true")
    plan = plan_edits(raw, settings)
    where = {"folder": tmp_path / "gate", "aside": tmp_path / "aside", "device": "cpu"}
    accuracy = label_gate(plan, raw, **where).fit()
    [kept] = (tmp_path / "gate" / "fitted").iterdir()
    content = kept.read_bytes()
    for place in (0, len(content) // 3, len(content) // 2):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        kept.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{kept} is damaged .* Delete it and run again"):
            label_gate(plan, raw, **where).fit()
    kept.unlink()
    trained = spy_on_fits(monkeypatch)
    assert label_gate(plan, raw, **where).fit() == accuracy
    assert not trained


def test_finished_teachers_are_read_and_a_missing_one_alone_is_trained(raw, tmp_path, monkeypatch):
    seen = spy_on_fits(monkeypatch)
    first = fitted(raw, tmp_path)
    assert len(seen) == 3
    again = fitted(raw, tmp_path)
    assert len(seen) == 3
    assert np.array_equal(again.held_out, first.held_out)
    one = sorted((tmp_path / "teachers").iterdir())[0]
    weights = (one / "model.safetensors").read_bytes()
    (one / "classifier.json").unlink()
    (one / "model.safetensors").unlink()  # as a kill before the rename would have left it
    fitted(raw, tmp_path)
    assert len(seen) == 4
    assert (one / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("override", "trained"),
    [
        ("training.arms=[vanilla]", 0),
        ("training.validations=3", 0),
        ("editing.prompts=[fog]", 0),
        ("editing.gate.false_reject_rate=0.1", 0),
        ("training.steps=3", 3),
        ("training.learning_rate=0.001", 3),
        ("size=40", 3),
        ("seed=1", 3),
    ],
)
def test_a_teacher_is_known_by_what_shapes_it(override, trained, raw, tmp_path, monkeypatch):
    fitted(raw, tmp_path, "training.steps=1")
    seen = spy_on_fits(monkeypatch)
    fitted(raw, tmp_path, "training.steps=1", override)
    assert len(seen) == trained


def test_a_class_that_some_teacher_would_not_see_is_named(tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 4)
    write_classes(tmp_path / "data", ["yak"], 1, seed=5)
    settings = quick_settings("source.train_per_class=null")
    aside = tmp_path / "aside"
    raw = ingest(str(source), settings, tmp_path / "raw", aside=aside, train_only=True)
    with pytest.raises(UserError, match="would see none of yak. Give each class at least two"):
        fitted(raw, tmp_path)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), min_size=1, max_size=80),
    st.integers(2, 6),
    st.integers(0, 3),
    st.randoms(),
)
def test_folds_follow_pictures_alone(drawn, folds, seed, random):
    labels, contents = (list(column) for column in zip(*drawn, strict=True))
    dealt = assign_folds(pictures(labels, contents), folds, seed)
    of_picture = dict(zip(contents, dealt, strict=True))
    # A copy shares its fold, whatever its label, and pictures are dealt evenly.
    assert [of_picture[content] for content in contents] == dealt.tolist()
    sizes = np.bincount(list(of_picture.values()), minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    order = random.sample(range(len(labels)), len(labels))
    shuffled = assign_folds(
        pictures([labels[i] for i in order], [contents[i] for i in order]), folds, seed
    )
    assert shuffled.tolist() == dealt[order].tolist()


@given(st.lists(st.integers(2, 12), min_size=1, max_size=6), st.integers(2, 6))
def test_every_class_is_in_every_teachers_training(sizes, folds):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    dealt = assign_folds(pictures(labels.tolist(), list(range(len(labels)))), folds, 0)
    for fold in range(folds):
        assert set(labels[dealt != fold]) == set(labels)


@pytest.mark.slow
def test_edits_of_digits_keep_their_label_and_lose_a_wrong_one(tmp_path):
    settings = quick_settings(
        *("source.train_per_class=20", "source.val_fraction=0.3", "source.test_fraction=0.4"),
        *("editing.steps=10", "editing.batch_size=20", "training.steps=150"),
        *("training.batch_size=64", "training.flip=false", "training.crop_padding=3"),
    )
    raw = ingest("digits", settings, tmp_path / "raw", aside=tmp_path / "aside")
    classes = [f"{digit}" for digit in range(10)]
    train = load_images([raw], "train", classes, 32, aside=tmp_path)
    teachers = fit_fold_teachers(
        raw, settings, folder=tmp_path / "teachers", aside=tmp_path / "aside", device="cpu"
    )
    thresholds = class_thresholds(teachers.held_out, teachers.labels, 10, 0.05)
    assert teachers.accuracy > 0.9
    assert (teachers.held_out >= thresholds[teachers.labels]).mean() >= 0.95

    editor = load_editor(BUNDLED_WEIGHTS, settings.editing, "cpu")
    chosen = np.arange(0, 200, 5)
    batches = np.split(chosen, 2)
    edits = [
        editor.edit(
            train.images[batch],
            ["A transformed version of image into sunset"] * 20,
            [seed_from(train.ids[index]) for index in batch],
        )
        for batch in batches
    ]
    found = teachers.teachers.probabilities(
        [train.ids[index] for index in chosen], np.concatenate(edits)
    )
    labels = train.labels[chosen]
    wrong = (labels + 4) % 10  # a 3 presented as a 7
    rows = np.arange(len(chosen))
    assert (found[rows, labels] >= thresholds[labels]).mean() > 0.7
    assert (found[rows, wrong] >= thresholds[wrong]).mean() < 0.1
