"""Promises: few-step editors edit as their pipelines do, each image for itself; none is unpickled.

The pipelines are of the real classes, tiny and with random weights.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import picture, quick_settings, tiny_editor, write_classes
from tiny_few_step import FAMILIES, tiny_klein, tiny_lora

from diffusemix_pipeline.cli import main
from diffusemix_pipeline.datasets.images import to_square
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.editing import editor as editors
from diffusemix_pipeline.editing.editor import (
    Editor,
    editor_fingerprint,
    load_editor,
    locate_editor,
    locate_lora,
)
from diffusemix_pipeline.editing.generate import Generated, generate
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.preflight import check_augmentation
from diffusemix_pipeline.settings import Settings, data_settings

IMAGES = np.stack([to_square(picture(seed), 32) for seed in range(2)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """A folder for each family."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def klein(weights) -> Path:
    return weights["Flux2KleinPipeline"]


def few_steps(folder: Path, *overrides: str) -> Settings:
    return quick_settings(
        f"editing.editor={folder}",
        "editing.sampler=checkpoint",
        "editing.guidance=1",
        "editing.dtype=float32",
        *overrides,
    )


def load(folder: Path, *overrides: str) -> Editor:
    located = locate_editor(str(folder), None)
    return load_editor(located, few_steps(folder, *overrides).editing, "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_depends_on_its_image_prompt_and_seed_and_on_nothing_else(family, weights):
    edit = load(weights[family]).edit
    together = edit(IMAGES, ["sunset", "mosaic"], [1, 2])
    assert together.shape == (2, 32, 32, 3)
    assert together.dtype == np.uint8
    (alone,) = edit(IMAGES[1:], ["mosaic"], [2])
    assert np.array_equal(alone, together[1])
    for other in (
        edit(IMAGES[:1], ["mosaic"], [2]),
        edit(IMAGES[1:], ["sunset"], [2]),
        edit(IMAGES[1:], ["mosaic"], [3]),
    ):
        assert not np.array_equal(other[0], alone)


def test_an_edit_is_what_the_pipeline_gives_by_itself(klein):
    image = picture(0, (64, 64))
    pipeline = diffusers.Flux2KleinPipeline.from_pretrained(klein)
    theirs = pipeline(
        image,
        "sunset",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    (ours,) = load(klein).edit(np.array(image)[None], ["sunset"], [5])
    assert np.array_equal(ours, (theirs[0] * 255).round().astype(np.uint8))


@pytest.mark.parametrize(("size", "works_at"), [(32, 64), (72, 80), (64, 64)])
def test_a_size_that_the_pipeline_does_not_take_is_scaled_and_not_cut(size, works_at, klein):
    pipeline_units = load(klein)
    taken = []
    real = pipeline_units._pipeline.vae.encode
    pipeline_units._pipeline.vae.encode = lambda x: taken.append(x.shape[-2:]) or real(x)
    image = to_square(picture(0), size)
    edit = pipeline_units.edit(image[None], ["sunset"], [0])
    assert edit.shape == (1, size, size, 3)
    assert taken == [(works_at, works_at)]


def test_a_seed_means_the_same_noise_in_every_number_format(klein):
    noise = []
    for dtype in ("float32", "bfloat16"):
        editor = load(klein, f"editing.dtype={dtype}")
        real = editor._pipeline.prepare_latents
        editor._pipeline.prepare_latents = lambda *args, real=real, **more: (
            noise.append(more["latents"]) or real(*args, **more)
        )
        editor.edit(IMAGES[:1], ["sunset"], [7])
    assert noise[0].dtype == torch.float32
    assert torch.equal(*noise)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Flux2KleinPipeline"])
def test_text_guidance_evaluates_the_transformer_twice_a_step(family, weights):
    for guidance, evaluations in ((1, 2), (3, 4)):
        guided = load(weights[family], f"editing.guidance={guidance}")
        calls: list[None] = []
        guided._pipeline.transformer.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(None)
        )
        guided.edit(IMAGES[:1], ["sunset"], [0])
        assert len(calls) == evaluations


def test_threads_that_share_an_editor_do_not_disturb_each_other(klein):
    edit = load(klein).edit
    one_by_one = [edit(IMAGES[:1], ["sunset"], [seed]) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda seed: edit(IMAGES[:1], ["sunset"], [seed]), range(4)))
    assert np.array_equal(one_by_one, at_once)


def test_an_instruction_that_would_be_cut_off_is_refused(klein):
    load(klein).check_instruction("A transformed version of image into sunset")
    with pytest.raises(UserError, match=r"has \d+ tokens; this editor reads 480"):
        load(klein).check_instruction("sunset " * 80)


def test_edits_that_are_no_numbers_are_no_black_images(klein):
    broken = load(klein)
    broken._pipeline.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="no numbers"):
        broken.edit(IMAGES, ["sunset", "mosaic"], [1, 2])


# Files


@pytest.mark.parametrize("family", FAMILIES)
def test_pickled_weights_are_never_read(family, tmp_path):
    FAMILIES[family](tmp_path)
    (safe,) = (tmp_path / "transformer").glob("*.safetensors")
    safe.unlink()
    torch.save({}, tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no transformer/\*.safetensors"):
        locate_editor(str(tmp_path), None)


def test_weights_in_several_files_are_those_in_one(klein, tmp_path):
    tiny_klein(tmp_path)
    (whole,) = (tmp_path / "transformer").glob("*.safetensors")
    transformer = diffusers.Flux2Transformer2DModel.from_pretrained(tmp_path / "transformer")
    whole.unlink()
    transformer.save_pretrained(tmp_path / "transformer", max_shard_size="30KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    edits = [load(each).edit(IMAGES[:1], ["sunset"], [0]) for each in (klein, tmp_path)]
    assert np.array_equal(*edits)


def test_the_chat_template_is_part_of_the_fingerprint(tmp_path):
    tiny_klein(tmp_path)
    before = editor_fingerprint(tmp_path, None)
    (template,) = tmp_path.rglob("*.jinja")
    template.write_text(template.read_text() + "!")
    assert editor_fingerprint(tmp_path, None) != before


# Settings


def test_the_settings_that_are_advised_are_honoured(weights):
    for family in editors.FAMILIES:
        if family.pipeline in weights:
            asked = {key: value for key, value in family.advice.items() if key != "lora"}
            asked_for = [f"editing.{key}={value}" for key, value in asked.items()]
            settings = few_steps(weights[family.pipeline], *asked_for)
            check_augmentation(settings)
            assert ("lora" in family.lacks) != hasattr(
                getattr(diffusers, family.pipeline), "load_lora_weights"
            )


@pytest.mark.parametrize(
    ("family", "setting", "repair"),
    [
        ("Flux2KleinPipeline", "sampler=dpmsolver++", "sampler=checkpoint"),
        ("Flux2KleinPipeline", "sampler=euler_ancestral", "sampler=checkpoint"),
        ("Flux2KleinPipeline", "guidance=4", "guidance=1"),
        ("QwenImageEditPipeline", "image_guidance=2", "image_guidance=1"),
        ("QwenImageEditPlusPipeline", "guidance_until=0.5", "guidance_until=1"),
        ("QwenImageEditPipeline", "guidance_from=0.1", "guidance_from=0"),
        ("LongCatImageEditPipeline", "lora=a/b/c.safetensors", "lora="),
    ],
)
def test_what_an_editor_cannot_honour_is_refused_with_the_repair(family, setting, repair, weights):
    settings = few_steps(weights[family], f"editing.{setting}")
    with pytest.raises(UserError, match=rf"editing.{setting.split('=')[0]}=.*{family}.*{repair}"):
        check_augmentation(settings)


def test_every_setting_that_is_refused_is_in_one_message(klein):
    preset = ("editing.sampler=euler_ancestral", "editing.guidance=4", "editing.image_guidance=1.5")
    with pytest.raises(UserError, match=r"sampler=euler_ancestral, .*1\.5, .*guidance=4\.0: the"):
        check_augmentation(few_steps(klein, *preset))


def test_a_klein_that_is_not_distilled_may_be_guided(tmp_path):
    tiny_klein(tmp_path, distilled=False)
    check_augmentation(few_steps(tmp_path, "editing.guidance=4"))
    edits = [
        load(tmp_path, f"editing.guidance={scale}").edit(IMAGES[:1], ["sunset"], [0])
        for scale in (1, 4)
    ]
    assert not np.array_equal(*edits)


# LoRA


@pytest.mark.parametrize("family", ["Flux2KleinPipeline", "QwenImageEditPipeline"])
def test_a_lora_changes_the_edit_and_the_identity(family, weights, tmp_path):
    folder = weights[family]
    lora = tiny_lora(folder, tmp_path / "lora.safetensors")
    plain = load(folder)
    with_lora = load(folder, f"editing.lora={lora}")
    names = [name for name, _ in with_lora._pipeline.transformer.named_modules()]
    assert not any("lora" in name for name in names)  # fused: no layers beside
    edits = [each.edit(IMAGES[:1], ["sunset"], [0]) for each in (plain, with_lora)]
    assert not np.array_equal(*edits)
    other = tiny_lora(folder, tmp_path / "other.safetensors", seed=1)
    identities = {editor_fingerprint(folder, each) for each in (None, lora, other)}
    assert len(identities) == 3
    places = [few_steps(folder, f"editing.lora={each}") for each in (lora, other)]
    assert data_settings(places[0]) == data_settings(places[1])


def test_instruct_pix2pix_takes_a_lora_too(tmp_path):
    folder = tiny_editor(tmp_path / "editor")
    lora = tiny_lora(folder, tmp_path / "lora.safetensors")
    images = np.stack([to_square(picture(0), 32)])
    edits = [
        load_editor(folder, quick_settings(*asked).editing, "cpu").edit(images, ["sunset"], [0])
        for asked in ([], [f"editing.lora={lora}"])
    ]
    assert not np.array_equal(*edits)


def test_a_lora_of_another_model_is_refused(klein, tmp_path):
    other = tiny_lora(tiny_editor(tmp_path / "editor"), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="fits no part of Flux2KleinPipeline"):
        load(klein, f"editing.lora={other}")


def test_a_lora_that_cannot_be_had_is_named_before_any_work(klein, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pinned = f"nobody/nothing@{'0' * 40}/lora.safetensors"
    with pytest.raises(UserError, match=f"{pinned} is neither a file here nor one that the hub"):
        check_augmentation(few_steps(klein, f"editing.lora={pinned}"))
    for name in ("nobody/nothing/l.safetensors", "a/b@main/l.safetensors", "l.safetensors"):
        with pytest.raises(UserError, match=f"{name} is no file here.*by its commit alone"):
            check_augmentation(few_steps(klein, f"editing.lora={name}"))
    with pytest.raises(UserError, match=r"is no .safetensors file"):
        locate_lora("lora.bin")


# The stage and the command


def generated(tmp_path: Path, settings: Settings) -> Generated:
    source = write_classes(tmp_path / "data", ["cat", "dog"], 1)
    aside = tmp_path / "aside"
    raw = ingest(str(source), settings, tmp_path / "raw", aside=aside, train_only=True)
    store = EditStore(tmp_path / "edits")
    return generate(raw, settings, tmp_path / "out", store=store, aside=aside, device="cpu")


def test_an_editor_of_one_at_a_time_pays_for_no_padding(klein, tmp_path):
    settings = few_steps(klein, "source.train_per_class=null")
    assert generated(tmp_path, settings).made == 2
    (profile,) = EditStore(tmp_path / "edits").status().profiles.values()
    assert profile["batch_size"] == 1
    assert generated(tmp_path, settings).made == 0
    lora = tiny_lora(klein, tmp_path / "lora.safetensors")
    with_lora = few_steps(klein, "source.train_per_class=null", f"editing.lora={lora}")
    assert generated(tmp_path, with_lora).made == 2


def test_the_list_names_every_family_with_what_suits_it():
    listed = CliRunner().invoke(main, ["editor", "list"])
    assert listed.exit_code == 0, listed.output
    assert "bundled" in listed.output
    for family in editors.FAMILIES:
        assert family.example in listed.output
        assert family.pipeline in listed.output
        for name, value in family.advice.items():
            assert f"{name}={value}" in listed.output
