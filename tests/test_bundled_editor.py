"""The bundled editor: its teachers, its folder, its training and what its edits are worth."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_classes
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusemix_pipeline.bundled_editor import evaluation, sources, teachers, training
from diffusemix_pipeline.editing.editor import BUNDLED_WEIGHTS, load_editor
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.settings import PAPER_PROMPTS, Editing
from diffusemix_pipeline.training.classifier import to_tensor

TINY = training.EditorRecipe(
    steps=4, small_batch=4, large_batch=2, made_pictures=6, channels=(16, 16, 16, 32), save_every=1
)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _edits(folder: Path, images: np.ndarray, prompt: str) -> torch.Tensor:
    """Return the edits from two seeds, [2, N, 3, S, S]."""
    editing = Editing(batch_size=len(images))
    editor = load_editor(folder, editing, "cpu")
    instructions = [editing.template.format(prompt=prompt)] * len(images)
    edited = (editor.edit(images, instructions, [seed] * len(images)) for seed in (0, 1))
    return torch.stack([to_tensor(each) for each in edited])


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(teachers.PROMPTS),
    st.integers(1, 3),
    st.sampled_from([16, 32, 45, 64]),
    st.integers(0, 2**31),
)
def test_teachers_keep_shape_and_range_and_follow_their_seed(prompt, count, size, seed):
    images = torch.rand(count, 3, size, size, generator=_generator(seed))
    first, again, other = (
        teachers.apply_teacher(images, prompt, _generator(its_seed))
        for its_seed in (seed, seed, seed + 1)
    )
    assert first.shape == images.shape
    assert first.dtype == torch.float32
    assert 0 <= first.min() <= first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_paper_s_prompts_have_a_teacher_each():
    assert list(teachers.PROMPTS) == PAPER_PROMPTS


def test_every_image_gets_its_own_draw():
    image = torch.rand(1, 3, 32, 32, generator=_generator(0)).repeat(2, 1, 1, 1)
    for prompt in teachers.PROMPTS:
        first, second = teachers.apply_teacher(image, prompt, _generator(0))
        assert not torch.equal(first, second), prompt


def test_mixed_prompts_edit_each_image_by_its_own():
    images = torch.rand(3, 3, 32, 32, generator=_generator(0))
    edited = teachers.apply_teachers(images, ["mosaic", "autumn", "mosaic"], _generator(1))
    autumn = teachers.apply_teacher(images[1:2], "autumn", _generator(1))
    assert torch.equal(edited[1:2], autumn)  # autumn comes first in the list, so it draws first
    assert not torch.equal(edited[0], images[0])


def test_made_pictures_follow_their_seed():
    first, again, other = (
        sources.make_pictures(3, 32, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (3, 32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_digits_of_the_two_splits_differ():
    train, test = (sources.read_digits(32, split)[0] for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in test)


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        sources.read_image_folder(tmp_path, 32)
    with pytest.raises(UserError, match="is no folder"):
        sources.read_image_folder(tmp_path / "missing", 32)


def test_what_is_no_image_is_left_out_by_name(tmp_path):
    write_classes(tmp_path, ["cat", "dog"], 2)
    (tmp_path / "cat" / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"Left out: .*broken.png"):
        images, names = sources.read_image_folder(tmp_path, 32)
    assert images.shape == (4, 32, 32, 3)
    assert names == ["cat", "cat", "dog", "dog"]


def test_classes_are_told_apart_by_name(tmp_path):
    folders = {}
    for split, classes in (("train", ["a", "b"]), ("test", ["b", "c"])):
        folders[split] = {"own": write_classes(tmp_path / split, classes, 1)}
    with pytest.raises(UserError, match="own: the test folder has classes .* lacks: c"):
        evaluation.evaluate_editor(
            BUNDLED_WEIGHTS,
            image_folders=folders["test"],
            train_folders=folders["train"],
            sheet=tmp_path / "sheet.png",
        )
    assert evaluation._numbers("own", ["b", "a"], ["a", "b", "b"]).tolist() == [1, 0]


def test_autoencoder_gives_back_what_it_gets_in_half_precision():
    images = torch.rand(2, 3, 32, 32, generator=_generator(0))
    autoencoder = training.build_autoencoder().half().float()
    figures = evaluation.measure_autoencoder(autoencoder, images)
    assert figures["psnr"] > 40
    assert min(figures["blue_kept"], figures["red_kept"]) > 0.95


def test_known_words_are_single_tokens_and_others_fall_back_to_characters():
    tokenizer = training.build_tokenizer()
    text = training.TEMPLATE.format(prompt="watercolor art")
    assert [token.removesuffix("</w>") for token in tokenizer.tokenize(text)] == (
        text.lower().split()
    )
    assert tokenizer.tokenize("Zoo") == ["z", "o", "o</w>"]
    assert tokenizer.unk_token_id not in tokenizer("naïve ☃!").input_ids[1:-1]


def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path):
    threads = torch.get_num_threads()
    whole = training.train_editor(tmp_path / "whole", checkpoint_dir=tmp_path / "a", recipe=TINY)

    def stop(description: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train_editor(
            tmp_path / "killed", checkpoint_dir=tmp_path / "b", recipe=TINY, progress=stop
        )
    killed = training.train_editor(tmp_path / "killed", checkpoint_dir=tmp_path / "b", recipe=TINY)
    assert _files(whole) == _files(killed)
    assert torch.get_num_threads() == threads
    edits = _edits(killed, sources.make_pictures(1, 32, np.random.default_rng(0)), "snowy")
    assert edits.shape == (2, 1, 3, 32, 32)


def test_another_seed_or_another_picture_is_another_training(tmp_path):
    few = training.EditorRecipe(
        steps=1, small_batch=4, large_batch=2, made_pictures=6, channels=TINY.channels
    )
    write_classes(tmp_path / "pictures", ["cat", "dog"], 2)

    def trained(name: str, **how):
        return training.train_editor(
            tmp_path / name, checkpoint_dir=tmp_path / "checkpoints", recipe=few, **how
        )

    first = _files(trained("first"))
    assert _files(trained("again")) == first
    assert _files(trained("seed", seed=1)) != first
    assert _files(trained("photos", image_folders=[tmp_path / "pictures"])) != first


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that were not made here"):
        training.train_editor(tmp_path, checkpoint_dir=tmp_path / "checkpoints", recipe=TINY)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_bundled_folder_is_small_and_holds_no_code():
    files = [path for path in BUNDLED_WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_bundled_editor_edits_a_digit():
    digit = sources.read_digits(32, "test")[0][:1]
    images = to_tensor(digit)
    first, second = _edits(BUNDLED_WEIGHTS, digit, "sunset")
    assert first.shape == images.shape
    assert (first - images).abs().mean() > 8 / 255
    assert (first - second).abs().mean() > 1 / 255


@pytest.mark.slow
def test_bundled_editor_reaches_its_figures_on_digits(tmp_path, monkeypatch):
    for name, fewer in (("_SIZES", (32,)), ("_IMAGES", 12), ("_JUDGE_STEPS", 300)):
        monkeypatch.setattr(evaluation, name, fewer)
    figures = evaluation.evaluate_editor(
        BUNDLED_WEIGHTS,
        image_folders={},
        train_folders={},
        sheet=tmp_path / "sheet.png",
    )["figures"]["digits"]["32"]
    assert figures["autoencoder"]["psnr"] >= 31
    assert figures["named"] >= 0.98
    assert figures["psnr"] >= 24
    assert min(one["psnr"] for one in figures["by_prompt"].values()) >= 19
    assert figures["variety"] >= 8
    assert figures["subject_lost"] <= 0.25
    assert (tmp_path / "sheet.png").stat().st_size > 0
