"""Promises: training repeats from its seed, is chosen on val, with equal steps for all arms."""

import json
import multiprocessing
import shutil
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import timm
import torch
from conftest import quick_settings, write_classes, write_edits
from safetensors.torch import save_file

from diffusemix_pipeline import recipes, settings
from diffusemix_pipeline.datasets import storage
from diffusemix_pipeline.datasets.images import read_square
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.manifest import Stage
from diffusemix_pipeline.devices import is_fast_at_bfloat16
from diffusemix_pipeline.editing.planning import teacher_recipe
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.recipes import recipe_of
from diffusemix_pipeline.training import arms, data, loop
from diffusemix_pipeline.training.arms import (
    Fit,
    Wanted,
    all_fits,
    few_image_fits,
    finished_fit,
    fit_arm,
    fit_fingerprint,
)
from diffusemix_pipeline.training.classifier import (
    build_classifier,
    check_model,
    load_classifier,
    save_classifier,
)
from diffusemix_pipeline.training.data import DecodedImages, LabelledImages, load_images
from diffusemix_pipeline.training.processes import train_together

PRETRAINED = ("training.pretrained=true", f"training.revision={'a' * 40}")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Stage:
    folder = tmp_path_factory.mktemp("raw")
    source = write_classes(folder / "data", ["cat", "dog", "emu"], 12)
    asked = quick_settings("source.val_fraction=0.3", "source.train_per_class=null")
    return ingest(str(source), asked, folder / "raw", aside=folder / "aside")


@pytest.fixture(scope="module")
def generated(raw, tmp_path_factory) -> Stage:
    folder = tmp_path_factory.mktemp("generated")
    return write_edits(raw, folder / "data", aside=folder / "aside")


def fitted(
    raw: Stage,
    tmp_path,
    *overrides: str,
    arm: str = "vanilla",
    per_class=None,
    edits=None,
    on_point=None,
    progress=silent,
) -> Fit:
    edits = edits or raw
    return fit_arm(
        Wanted(arm, 0, per_class),
        {"raw": raw, "generated": edits, "hybrid": edits, "augmented": edits},
        quick_settings(*overrides),
        checkpoints=tmp_path / "checkpoints",
        fractal_cache=tmp_path / "fractals",
        aside=tmp_path / "aside",
        device="cpu",
        on_point=on_point or (lambda step, metrics: None),
        progress=progress,
    )


def weights(fit: Fit) -> bytes:
    return (fit.folder / "model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_weights(raw, tmp_path):
    one, two = fitted(raw, tmp_path / "1"), fitted(raw, tmp_path / "2")
    assert weights(one) == weights(two)
    assert one.curve.equals(two.curve)
    assert weights(one) != weights(fitted(raw, tmp_path / "3", "seed=1"))


def test_a_finished_fit_is_not_trained_again_and_tells_its_curve(raw, tmp_path, monkeypatch):
    points, again = [], []
    first = fitted(raw, tmp_path, on_point=lambda *point: points.append(point))
    monkeypatch.setattr(arms, "fit", lambda *args, **how: pytest.fail("trained again"))
    second = fitted(raw, tmp_path, on_point=lambda *point: again.append(point))
    assert second.fingerprint == first.fingerprint
    assert [step for step, _ in points] == [2, 4]
    for (_, live), (_, told) in zip(points, again, strict=True):
        assert told == pytest.approx(live)


def test_a_fit_cut_off_leaves_nothing_that_looks_finished(raw, tmp_path):
    def stop(step, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(raw, tmp_path, on_point=stop)
    fingerprint = fit_fingerprint(Wanted("vanilla", 0), {"raw": raw}, quick_settings())
    assert finished_fit(tmp_path / "checkpoints", fingerprint) is None


def test_arms_differ_in_their_images_alone(raw, generated, tmp_path):
    fits = {arm: fitted(raw, tmp_path, arm=arm, edits=generated) for arm in settings.ARMS}
    originals = raw.counts["by_split"]["train"]
    with_edits = {"generated_only", "hybrid_only"} | {arm for arm in fits if "diffusemix" in arm}
    for arm, fit in fits.items():
        assert fit.steps == 4
        assert fit.images == sum(originals.values()) * (1 + (arm in with_edits))
    assert len({fit.fingerprint for fit in fits.values()}) == len(fits) == 12
    assert weights(fits["vanilla"]) != weights(fits["trivialaugment"])
    assert weights(fits["vanilla"]) != weights(fits["cutmix"])


def test_an_edit_is_mixed_online_with_the_original_it_was_made_from(raw, generated, tmp_path):
    classes = ["cat", "dog", "emu"]
    images = load_images([raw, generated], "train", classes, 32, aside=tmp_path).images
    sources = arms._sources_of_edits(raw, generated)
    assert np.array_equal(images[sources], 255 - images[len(images) - len(sources) :])


def test_what_is_drawn_while_training_shapes_the_fits_that_draw_it(raw, generated):
    def fingerprints(*overrides: str) -> dict[str, str]:
        stages = {"raw": raw, "generated": generated, "augmented": generated}
        drawing = ("mixup", "pixmix", "diffusemix", "diffusemix_online")
        return {
            a: fit_fingerprint(Wanted(a, 0), stages, quick_settings(*overrides)) for a in drawing
        }

    before = fingerprints()

    def changed(*overrides: str) -> set[str]:
        return {arm for arm, print_ in fingerprints(*overrides).items() if print_ != before[arm]}

    assert changed("mixing.lam=0.5") == {"diffusemix_online"}
    assert changed("mixing.masks=[left]") == {"diffusemix_online"}
    assert changed("mixing.fractal_count=5") == {"pixmix", "diffusemix_online"}


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("training.arms=[vanilla]", True),
        ("training.seeds=[0, 1]", True),
        ("evaluation.batch_size=7", True),
        ("mixing.lam=0.5", True),  # it changes the augmented images' version, not the recipe
        ("training.steps=5", False),
        ("training.model=resnet18", False),
        ("size=64", False),
        ("seed=1", False),
    ],
)
def test_a_fit_is_known_by_what_shapes_it(override, same, raw):
    stages = {"raw": raw}
    before = fit_fingerprint(Wanted("vanilla", 0), stages, quick_settings())
    assert (
        fit_fingerprint(Wanted("vanilla", 0), stages, quick_settings(override)) == before
    ) == same


def test_a_new_test_image_asks_for_no_training(raw, tmp_path):
    before = fit_fingerprint(Wanted("vanilla", 0), {"raw": raw}, quick_settings())
    shutil.copytree(raw.folder, tmp_path / "raw")
    rows = raw.manifest()
    of_split = {split: rows.index[rows["split"] == split][0] for split in ("train", "val", "test")}

    def without(split: str) -> str:
        rows.drop(of_split[split]).to_parquet(tmp_path / "raw" / "manifest.parquet")
        # A version follows from every row, so other rows are another version.
        stages = {"raw": replace(raw, folder=tmp_path / "raw", version=f"without {split}")}
        return fit_fingerprint(Wanted("vanilla", 0), stages, quick_settings())

    assert without("test") == before
    assert before not in (without("train"), without("val"))


def test_the_weights_that_val_likes_best_are_kept(raw, tmp_path):
    fit = fitted(raw, tmp_path, "training.steps=30", "training.validations=10")
    classifier = load_classifier(fit.folder)
    val = load_images([raw], "val", classifier.classes, 32, aside=tmp_path)
    accuracy = (classifier.predict_proba(val.images).argmax(1) == val.labels).mean()
    assert accuracy == pytest.approx(fit.curve["val_accuracy"].max())
    assert fit.best["val_accuracy"] == pytest.approx(accuracy)


def test_decoded_images_are_read_as_from_an_array_and_leave_no_file(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    images = DecodedImages(array, 8, tmp_path)
    assert not list(tmp_path.iterdir())
    some, chosen = np.array([7, 0, 7, 19]), array[:, 0, 0, 0] > 100
    assert len(images) == 20
    assert np.array_equal(images[some], array[some])
    assert np.array_equal(images[5:9], array[5:9])
    assert np.array_equal(images[18:40], array[18:])
    of_chosen = images.subset(chosen)
    assert len(of_chosen) == chosen.sum()
    assert np.array_equal(of_chosen.subset(np.array([2, 1]))[:], array[chosen][[2, 1]])
    assert np.array_equal(images[:], array)  # a subset leaves the whole as it was


def test_images_of_several_stages_follow_each_other_and_their_labels(raw, tmp_path):
    classes = ["emu", "dog", "cat"]
    once = load_images([raw], "train", classes, 32, aside=tmp_path)
    twice = load_images([raw, raw], "train", classes, 32, aside=tmp_path)
    assert twice.ids == once.ids * 2
    assert twice.labels.tolist() == once.labels.tolist() * 2
    assert np.array_equal(twice.images[:], np.concatenate([once.images[:]] * 2))
    rows = raw.manifest().set_index("sha256")
    for place, image_id in enumerate(once.ids):
        assert classes[once.labels[place]] == rows.loc[image_id, "label"]
        file = raw.folder / rows.loc[image_id, "file_name"]
        assert np.array_equal(once.images[place : place + 1][0], read_square(file, 32))


def test_memory_holds_no_decoded_images(tmp_path):
    tracemalloc.start()
    images = DecodedImages((np.full((64, 64, 3), n, np.uint8) for n in range(250)), 64, tmp_path)
    total = sum(int(images[start : start + 10].sum()) for start in range(0, 250, 10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == sum(range(250)) * 64 * 64 * 3
    assert peak < 250 * 64 * 64 * 3 / 10


def test_what_a_disk_is_too_small_for_is_decoded_when_it_is_used(raw, tmp_path, monkeypatch):
    classes = ["cat", "dog", "emu"]
    decoded = load_images([raw], "train", classes, 32, aside=tmp_path)
    trained = fitted(raw, tmp_path / "1")
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    with pytest.warns(UserWarning, match=r"of the disk of .*, which has 0\.0 GB left"):
        stored = load_images([raw], "train", classes, 32, aside=tmp_path / "aside")
    for index in (np.array([3, 0]), slice(2, 5), np.array([], int)):
        assert np.array_equal(stored.images[index], decoded.images[index])
    some = np.array([4, 1])
    assert np.array_equal(stored.subset(some).images[:], decoded.subset(some).images[:])
    with pytest.warns(UserWarning, match="decoded whenever"):
        assert weights(fitted(raw, tmp_path / "2")) == weights(trained)


def test_arms_share_what_was_decoded_for_the_one_before(raw, generated, tmp_path, monkeypatch):
    load, read = data.loading_once(), []
    told = storage.decode_square
    monkeypatch.setattr(storage, "decode_square", lambda *a: read.append(a) or told(*a))
    asked = ["train", ["cat", "dog", "emu"], 32]
    first = load([raw], *asked, aside=tmp_path)
    assert load([raw], *asked, aside=tmp_path) is first
    assert len(read) == len(first)
    both = load([raw, generated], *asked, aside=tmp_path)
    assert len(read) == len(first) + len(both) == 3 * len(first)
    load([raw], "train", ["cat", "dog", "emu"], 16, aside=tmp_path)
    assert len(read) == 4 * len(first)


def test_it_learns(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = rng.integers(0, 100, (40, 32, 32, 3), dtype=np.uint8)
    images[labels == 1] += 120  # one class is brighter
    data = LabelledImages(DecodedImages(images, 32, tmp_path), labels, [str(n) for n in range(40)])
    torch.manual_seed(0)
    classifier = build_classifier("resnet10t", ["dark", "bright"], 32)
    training = quick_settings("training.steps=30").training
    curve = loop.fit(classifier, data, data, training, seed=0, device="cpu")
    assert curve["val_accuracy"].max() == 1.0


def test_a_classifier_reads_back_as_it_was_saved(raw, tmp_path):
    fit = fitted(raw, tmp_path)
    classifier = load_classifier(fit.folder)
    assert classifier.classes == ("cat", "dog", "emu")
    image = classifier.prepare(raw.folder / raw.manifest()["file_name"][0])
    assert image.shape == (32, 32, 3)
    probabilities = classifier.predict_proba(image[None])
    assert probabilities.shape == (1, 3)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert not [p for p in fit.folder.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".pkl")]


def test_an_unknown_model_is_named_with_its_neighbours():
    with pytest.raises(UserError, match=r"no model 'resnet10s'.*resnet10t"):
        check_model("resnet10s", 32, pretrained=None)


def test_a_model_that_does_not_take_the_size_is_told_before_training():
    with pytest.raises(UserError, match="inception_v3 does not take images of 32 px"):
        check_model("inception_v3", 32, pretrained=None)
    check_model("vit_tiny_patch16_224", 64, pretrained=None)


def test_pretrained_weights_are_safetensors_of_one_commit(tmp_path, monkeypatch, trap):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshots, commit = tmp_path / "models--timm--test_resnet.r160_in1k" / "snapshots", "1" * 40
    (snapshots / commit).mkdir(parents=True)
    torch.save(trap, snapshots / commit / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=f"test_resnet cannot be had as model.safetensors at .*{commit}"
    ):
        check_model("test_resnet", 64, pretrained=commit)
    weights = timm.create_model("test_resnet").state_dict()
    save_file(weights, snapshots / commit / "model.safetensors")
    check_model("test_resnet", 64, pretrained=commit)
    backbone = build_classifier("test_resnet", ["a", "b"], 64, pretrained=commit).model.backbone
    assert torch.equal(backbone.state_dict()["conv1.0.weight"], weights["conv1.0.weight"])
    with pytest.raises(UserError, match="training.revision 2222"):
        check_model("test_resnet", 64, pretrained="2" * 40)
    with pytest.raises(UserError, match=r"training.revision = None .*by their commit alone"):
        quick_settings("training.pretrained=true")


def test_a_commit_of_weights_that_are_not_used_trains_nothing_anew(raw):
    known = {
        fit_fingerprint(Wanted("vanilla", 0), {"raw": raw}, quick_settings(*asked))
        for asked in ([], ["training.revision=" + "a" * 40], ["thumbnails=false"])
    }
    assert len(known) == 1


@pytest.mark.parametrize("model", ["hf-hub:nobody/nothing", "local-dir:/tmp/nothing"])
def test_a_classifier_is_built_from_code_that_is_installed(model, tmp_path):
    save_classifier(build_classifier("test_resnet", ["a", "b"], 32), tmp_path)
    description = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps({**description, "model": model}))
    with pytest.raises(UserError, match=f"a model '{model}', which timm does not know"):
        load_classifier(tmp_path)


def test_pickled_weights_of_a_classifier_are_never_read(tmp_path, trap):
    save_classifier(build_classifier("test_resnet", ["a", "b"], 32), tmp_path)
    torch.save(trap, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged \(SafetensorError"):
        load_classifier(tmp_path)


def test_each_epoch_shows_every_image_once():
    seen = np.concatenate([loop.places_of_step(step, 4, 10, seed=0) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_crops_shift_and_flips_mirror():
    images = np.zeros((640, 8, 8, 3), np.uint8)
    images[:, 4, 2] = 255
    training = quick_settings("training.crop_padding=1", "training.flip=true").training
    cropped = loop._crop_and_flip(images, training, np.random.default_rng(0))
    spots = {tuple(np.argwhere(image[..., 0])[0]) for image in cropped}
    assert spots == {(y, x) for y in (3, 4, 5) for x in (1, 2, 3, 4, 5, 6)}
    still = quick_settings("training.crop_padding=0", "training.flip=false").training
    assert np.array_equal(loop._crop_and_flip(images, still, np.random.default_rng(0)), images)


def test_preact_resnet18_keeps_the_size_of_small_images(tmp_path):
    check_model("preact_resnet18", 32, pretrained=None)
    with pytest.raises(UserError, match="no weights of preact_resnet18 exist"):
        check_model("preact_resnet18", 32, pretrained="0" * 40)
    classifier = build_classifier("preact_resnet18", ["a", "b", "c"], 32)
    features = classifier.model.backbone.forward_features(torch.zeros(1, 3, 32, 32))
    assert features.shape == (1, 512, 4, 4)  # three strides of two, as in the paper
    assert 11.1e6 < sum(p.numel() for p in classifier.model.parameters()) < 11.3e6
    save_classifier(classifier, tmp_path)
    again = load_classifier(tmp_path)
    image = np.zeros((1, 32, 32, 3), np.uint8)
    assert np.array_equal(again.predict_proba(image), classifier.predict_proba(image))


@pytest.mark.parametrize(
    ("overrides", "recipe"),
    [
        ([], ("adamw", 2e-3, 0.05)),
        (["training.model=preact_resnet18", "training.batch_size=128"], ("sgd", 0.1, 1e-4)),
        (["training.model=resnet50", "training.batch_size=64"], ("sgd", 0.025, 5e-4)),
        (["training.model=vit_small_patch16_224"], ("adamw", 5e-4, 0.05)),
        (["training.model=resnet50", *PRETRAINED], ("sgd", 0.1 * 8 / 2560, 5e-4)),
        (["training.model=resnet50", "training.learning_rate=1"], ("sgd", 1, 5e-4)),
        (["training.optimizer=sgd", "training.weight_decay=0"], ("sgd", 0.1 * 8 / 256, 0)),
        (["training.model=resnet50.a1_in1k"], ("sgd", 0.1 * 8 / 256, 5e-4)),
        (["training.model=resnet101"], ("sgd", 0.1 * 8 / 256, 5e-4)),
        (["training.model=resnet50", "training.optimizer=adamw"], ("adamw", 2e-3, 0.05)),
    ],
)
def test_the_recipe_follows_from_the_model_where_settings_leave_it_open(overrides, recipe):
    found = recipe_of(quick_settings(*overrides).training)
    assert found.optimizer == recipe[0]
    assert found[1:] == pytest.approx(recipe[1:])


def test_a_new_recipe_makes_new_fits_and_new_teachers_alone_where_it_is_used(raw, monkeypatch):
    def identities(*overrides: str) -> list[Any]:
        settings = quick_settings("training.model=resnet18", *overrides)
        wanted = fit_fingerprint(Wanted("vanilla", 0), {"raw": raw}, settings)
        return [wanted, teacher_recipe(settings)]

    open_before = identities()
    fixed = ["training.optimizer=sgd", "training.learning_rate=1", "training.weight_decay=0"]
    fixed_before = identities(*fixed)
    monkeypatch.setitem(recipes._RECIPES, "resnet[0-9]*", recipes.Recipe("sgd", 0.3, 5e-4))
    assert not [same for same, was in zip(identities(), open_before, strict=True) if same == was]
    assert identities(*fixed) == fixed_before


@pytest.mark.parametrize("model", ["resnet18", "vit_tiny_patch16_224", "preact_resnet18"])
def test_each_kind_of_model_is_trained_by_its_recipe(raw, tmp_path, model):
    fit = fitted(raw, tmp_path, f"training.model={model}", "training.label_smoothing=0.1")
    assert fit.curve["train_loss"].notna().all()


def test_fewer_images_keep_their_own_edits_and_are_among_the_more(raw, generated, tmp_path):
    images = load_images([raw, generated], "train", ["cat", "dog", "emu"], 32, aside=tmp_path)
    sources = arms._sources_of_edits(raw, generated)
    kept = {}
    for number in (2, 5, 1000):
        few, of_edits = arms._few(images, sources, number, seed=0)
        originals = len(few) - len(of_edits)
        counts = np.bincount(few.labels[:originals])
        assert (counts == np.minimum(number, np.bincount(images.labels[: -len(sources)]))).all()
        assert np.array_equal(few.images[of_edits], 255 - few.images[originals : len(few)])
        kept[number] = set(few.ids[:originals])
    assert kept[2] < kept[5] < kept[1000]
    other, _ = arms._few(images, sources, 2, seed=1)
    assert set(other.ids[: len(kept[2])]) != kept[2]


@pytest.mark.parametrize("arm", ["vanilla", "diffusemix", "diffusemix_online"])
def test_a_fit_of_few_images_is_another_fit(raw, generated, tmp_path, arm):
    fits = [
        fitted(raw, tmp_path, arm=arm, per_class=number, edits=generated) for number in (2, None)
    ]
    assert fits[0].images == (6 if arm == "vanilla" else 12)
    assert fits[0].per_class == 2
    assert fits[0].steps == fits[1].steps
    assert fits[0].fingerprint != fits[1].fingerprint


def test_the_curve_over_images_is_of_vanilla_and_diffusemix(raw):
    chosen = "training.arms=[vanilla, mixup, diffusemix]"
    asked = quick_settings(chosen, "training.seeds=[0, 1]", "training.few_images=[3, 2, 500]")
    few = few_image_fits(asked, raw)
    assert {fit.arm for fit in few} == {"vanilla", "diffusemix"}
    assert {(fit.seed, fit.per_class) for fit in few} == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert len(all_fits(asked)) == 6
    stages = {"raw": raw}
    assert fit_fingerprint(Wanted("vanilla", 0), stages, asked) == fit_fingerprint(
        Wanted("vanilla", 0), stages, quick_settings()
    )


def test_processes_that_read_the_same_images_do_not_disturb_each_other(tmp_path):
    images = np.repeat(np.arange(64, dtype=np.uint8), 16 * 16 * 3).reshape(64, 16, 16, 3)
    decoded = DecodedImages(images, 16, tmp_path)

    def read_all() -> None:
        rng = np.random.default_rng()
        for _ in range(300):
            places = rng.integers(0, 64, 8)
            assert (decoded[places][:, 0, 0, 0] == places).all()

    forks = [multiprocessing.get_context("fork").Process(target=read_all) for _ in range(3)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join()
    assert [fork.exitcode for fork in forks] == [0, 0, 0]


class CutOffError(Exception):
    pass


@pytest.mark.parametrize("arm", ["vanilla", "cutmix"])
def test_a_training_goes_on_in_the_middle_of_an_epoch(raw, tmp_path, monkeypatch, arm):
    monkeypatch.setattr(loop, "_KEEP_EVERY_SECONDS", 0)
    longer = ["training.steps=7", "training.validations=2", "training.batch_size=8"]
    whole = fitted(raw, tmp_path / "whole", *longer, arm=arm)
    done: list[int] = []

    def cut_off(description: str, step: int, total: int) -> None:
        if description.startswith("Training"):
            done.append(step)
            if step in (2, 5) and done.count(step) == 1:
                raise CutOffError

    for _ in range(2):
        with pytest.raises(CutOffError):
            fitted(raw, tmp_path / "cut", *longer, arm=arm, progress=cut_off)
    again = fitted(raw, tmp_path / "cut", *longer, arm=arm, progress=cut_off)
    assert done == [1, 2, 3, 4, 5, 6, 7]
    assert weights(again) == weights(whole)
    assert again.curve.equals(whole.curve)
    assert {path.suffix for path in (tmp_path / "cut" / "checkpoints").iterdir()} == {""}


# Without batch norm, which sees a part at a time, and without draws, which differ from part to
# part, a batch that is divided gives the very gradients of the whole one.
EXACT = [
    "training.model=test_vit",
    "training.optimizer=sgd",
    "training.learning_rate=0.05",
    "training.crop_padding=0",
    "training.flip=false",
    "training.batch_size=8",
]


@pytest.mark.parametrize("how", ["accumulate=4", "processes=2", "processes=2,accumulate=2"])
def test_a_divided_batch_trains_as_a_whole_one(raw, tmp_path, how):
    divided = [f"training.{part}" for part in how.split(",")]
    points: list[int] = []
    one = fitted(raw, tmp_path, *EXACT)
    other = fitted(
        raw, tmp_path, *EXACT, *divided, on_point=lambda step, metrics: points.append(step)
    )
    assert one.fingerprint != other.fingerprint
    assert points == list(other.curve["step"]) == list(one.curve["step"])
    ours, theirs = (load_classifier(fit.folder).model.state_dict() for fit in (one, other))
    torch.manual_seed(seed_from(quick_settings().seed, "weights", 0))
    start = build_classifier("test_vit", ["cat", "dog", "emu"], 32).model.state_dict()
    exact = 2e-3 if is_fast_at_bfloat16("cpu") else 1e-5  # sums of parts are rounded in bfloat16
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], atol=exact), name
    assert any(not torch.allclose(ours[name], start[name], atol=1e-2) for name in ours)


def test_two_processes_go_on_from_where_they_were_cut_off(raw, tmp_path):
    def cut_off(step: int, metrics: dict[str, float]) -> None:
        raise CutOffError

    steps: list[int] = []

    def note(description: str, step: int, total: int) -> None:
        if description.startswith("Training"):
            steps.append(step)

    two = ["training.processes=2", "training.steps=30", "training.validations=10"]
    whole = fitted(raw, tmp_path / "whole", *two)
    with pytest.raises(CutOffError):
        fitted(raw, tmp_path / "cut", *two, on_point=cut_off)
    assert not multiprocessing.active_children()
    again = fitted(raw, tmp_path / "cut", *two, progress=note)
    assert steps == list(range(31 - len(steps), 31))
    assert len(steps) <= 27  # the first validation was kept; the others may have gone on a little
    assert again.curve.equals(whole.curve)
    assert weights(again) == weights(whole)


def test_shares_of_a_batch_are_the_batch(raw, tmp_path):
    train = load_images([raw], "train", ["cat", "dog", "emu"], 32, aside=tmp_path)
    training = quick_settings("training.crop_padding=0", "training.flip=false").training

    def share(rank: int, of: int) -> list[bytes]:
        batches = loop._Batches(train, training, loop.NONE, 0, rank, of)
        return [image.numpy().tobytes() for image in batches[3][0]]

    assert sorted([*share(0, 2), *share(1, 2)]) == sorted(share(0, 1))


def fail_second(group, tell) -> None:
    if not group.is_main_process:
        raise CutOffError
    group.wait_for_everyone()


def test_a_process_that_fails_ends_those_that_wait_for_it():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="CutOffError"):
        train_together(2, "cpu", fail_second, (), print)
    assert not multiprocessing.active_children()


def listening(group, tell) -> None:
    """Tell which addresses this process listens on."""
    group.wait_for_everyone()
    if group.is_main_process:
        own = psutil.Process().net_connections("inet")
        tell([connection.laddr.ip for connection in own if connection.status == "LISTEN"])


def test_processes_that_train_together_listen_on_loopback_alone():
    told: list[list[str]] = []
    train_together(2, "cpu", listening, (), told.append)
    assert told[0]
    assert set(told[0]) <= {"127.0.0.1", "::1"}


def test_what_was_begun_and_cannot_be_read_is_begun_anew(raw, tmp_path):
    whole = fitted(raw, tmp_path / "whole")
    begun = tmp_path / "torn" / "checkpoints" / f"{whole.fingerprint}.begun"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"\.begun cannot be read .*: training begins anew"):
        again = fitted(raw, tmp_path / "torn")
    assert weights(again) == weights(whole)
    assert not begun.exists()


def test_a_process_that_fails_ends_the_training_with_its_error(raw, tmp_path):
    two = ["training.processes=2", "training.batch_size=8"]
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="no-such-model"):
        fitted(raw, tmp_path, *two, "training.model=no-such-model")
    assert not multiprocessing.active_children()
