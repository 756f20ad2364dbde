"""Promise: every value has a known origin, and a wrong one gets one message that repairs it."""

from pathlib import Path
from typing import get_args

import pytest

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.evidence import asked_of
from diffusemix_pipeline.layers import describe, load_layers, load_settings, preset_names
from diffusemix_pipeline.settings import Corruption, Settings, data_settings, flatten


def load(root: Path, *overrides: str, environment: dict[str, str] | None = None, **how) -> Settings:
    return load_settings(root, overrides=overrides, environment=environment or {}, **how)


def test_each_layer_lies_over_the_one_before(tmp_path):
    (tmp_path / "more.yaml").write_text("editing: {steps: 3}")
    assert load(tmp_path).editing.steps == 10
    assert load(tmp_path, preset="paper").editing.steps == 100
    (tmp_path / "diffusemix.yaml").write_text("preset: paper\nediting: {steps: 2}\nseed: 7")
    assert load(tmp_path).editing.guidance == 4
    assert load(tmp_path).editing.steps == 2
    config = tmp_path / "more.yaml"
    assert load(tmp_path, config=config).editing.steps == 3
    environment = {"DIFFUSEMIX_EDITING__STEPS": "4"}
    assert load(tmp_path, config=config, environment=environment).editing.steps == 4
    last = load(tmp_path, "editing.steps=5", config=config, environment=environment)
    assert last.editing.steps == 5
    assert last.seed == 7


def test_the_command_line_chooses_the_preset_over_the_file(tmp_path):
    (tmp_path / "diffusemix.yaml").write_text("preset: paper")
    assert load(tmp_path, preset="official").editing.template == "{prompt}"


@pytest.mark.parametrize(
    ("preset", "model"),
    [
        ("general", "preact_resnet18"),
        ("fine_grained", "resnet50"),
        ("fine_tuning", "resnet50"),
        ("data_scarcity", "resnet50"),
        ("adversarial", "preact_resnet18"),
    ],
)
def test_the_tasks_presets_ask_for_evidence(preset, model, tmp_path):
    asked = load(tmp_path, preset=preset)
    assert len(asked.training.seeds) >= 3
    assert asked.training.model.partition(".")[0] == model
    assert {"vanilla", "diffusemix", "augmix", "pixmix"} <= set(asked.training.arms)
    assert set(asked.evaluation.corruptions) == set(get_args(Corruption))
    assert asked.evaluation.severities == [1, 2, 3, 4, 5]
    assert bool(asked.training.few_images) == (preset == "data_scarcity")


@pytest.mark.parametrize("preset", preset_names())
def test_presets_are_valid_and_each_reason_belongs_to_a_value(preset, tmp_path):
    layer, *_ = load_layers(tmp_path, preset=preset, environment={})
    load(tmp_path, preset=preset)
    keys = {setting.key for setting in describe([layer]) if setting.origin != "default"}
    assert set(layer.known_from) <= keys


@pytest.mark.parametrize(
    ("preset", "evaluations", "gate"),
    [
        ("paper", 300, False),
        ("official", 300, False),
        ("balanced", 20, True),
        ("turbo", 9, True),
    ],
)
def test_the_tiers_are_what_the_docs_say(preset, evaluations, gate, tmp_path):
    editing = load(tmp_path, preset=preset).editing
    assert editing.unet_evaluations == evaluations
    assert editing.gate.enabled == gate


@pytest.mark.parametrize(
    ("preset", "size", "template", "prompts_per_image", "masks", "seam"),
    [
        (
            *("paper", 512, "A transformed version of image into {prompt}", "one"),
            *(["left", "right", "top", "bottom"], 0),
        ),
        ("official", 256, "{prompt}", "all", ["left", "top"], 20),
    ],
)
def test_presets_hold_what_is_known_of_the_method(
    preset, size, template, prompts_per_image, masks, seam, tmp_path
):
    chosen = load(tmp_path, preset=preset)
    assert chosen.size == size
    assert chosen.editing.editor == "timbrooks/instruct-pix2pix"
    assert chosen.editing.template == template
    assert chosen.editing.prompts_per_image == prompts_per_image
    assert chosen.editing.copies == 1
    assert chosen.editing.sampler == "euler_ancestral"
    assert chosen.editing.steps == 100
    assert (chosen.editing.guidance, chosen.editing.image_guidance) == (4, 1.5)
    assert not chosen.editing.gate.enabled
    assert (chosen.mixing.masks, chosen.mixing.seam, chosen.mixing.lam) == (masks, seam, 0.2)
    assert chosen.editing.prompts == [
        *("autumn", "snowy", "watercolor art", "sunset", "rainbow"),
        *("aurora", "mosaic", "ukiyo-e", "a sketch with crayon"),
    ]


def test_the_paper_preset_says_how_far_each_value_is_known(tmp_path):
    origins = {s.key: s.origin for s in describe(load_layers(tmp_path, preset="paper"))}
    assert "three re-implementations" in origins["editing.template"]
    assert "unknown" in origins["editing.copies"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("editing.stpes=3", r"editing\.stpes \(from --set\).*Did you mean editing\.steps"),
        ("steps=3", r"Did you mean (editing|training)\.steps"),
        ("editing.steps=0", r"editing\.steps = 0 \(from --set\).*greater than 0"),
        ("editing.steps=many", "editing.steps = 'many'"),
        ("editing.prompts=[]", "editing.prompts"),
        ("editing.prompts=['']", r"editing\.prompts\.0"),
        ("editing.prompts=sunset", r"write a list, in brackets: \[sunset\]"),
        ("training.seeds=3", r"write a list, in brackets: \[3\]"),
        ("device=gpu", "use auto, cpu, cuda, cuda:N"),
        ("editing.revision=main", "write all 40 hex digits"),
        ("owners=[me]", r"owners\.0 = 'me'.*write an email address, or team:NAME"),
        ("training.pretrained=true", "training.pretrained=true needs it"),
        ("editing.prompts=[fog, fog]", "named twice: fog"),
        ("editing.template=a } {prompt}", "needs {prompt} exactly once"),
        ("editing.template=hello", "needs {prompt} exactly once"),
        ("mixing.lam=1.5", "mixing.lam"),
        ("mixing.lam=.nan", "mixing.lam"),
        ("size=33", "multiple of 8"),
        ("training.arms=[vanila]", "use vanilla, "),
        ("nonsense", "write it as key.path=value"),
        ("a: [b=1", "is not a YAML value|no such setting"),
    ],
)
def test_a_wrong_setting_gets_one_message_that_names_it_and_the_repair(override, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(tmp_path, override)


def test_images_of_ones_own_leave_a_preset_with_its_own_images_behind(tmp_path):
    (tmp_path / "diffusemix.yaml").write_text("preset: demo\nseed: 7")
    own = {"own_images": True}
    with pytest.warns(UserWarning, match="preset 'demo' of diffusemix.yaml .* is left out"):
        settings = load(tmp_path, **own)
    assert settings.source.train_per_class is None
    assert settings.seed == 7


def test_images_of_ones_own_leave_no_other_preset_behind(tmp_path, recwarn):
    (tmp_path / "diffusemix.yaml").write_text("preset: paper")
    own = {"own_images": True}
    assert load(tmp_path, **own).size == 512
    (tmp_path / "diffusemix.yaml").write_text("preset: demo")
    (tmp_path / "mine.yaml").write_text("preset: paper")
    assert load(tmp_path, config=tmp_path / "mine.yaml", **own).size == 512
    assert load(tmp_path, "preset=paper", **own).size == 512
    assert load(tmp_path, environment={"DIFFUSEMIX_PRESET": "paper"}, **own).size == 512
    assert load(tmp_path, preset="demo", **own).source.train_per_class == 20
    assert not recwarn.list


def test_no_preset_can_be_asked_for_and_null_is_a_value(tmp_path):
    (tmp_path / "diffusemix.yaml").write_text("preset: demo\nediting:\n")
    assert load(tmp_path).source.train_per_class == 20
    assert load(tmp_path, preset="none").source.train_per_class is None
    assert load(tmp_path, "preset=paper").size == 512
    layers = load_layers(tmp_path, overrides=["source.train_per_class=null"], environment={})
    origins = {setting.key: setting.origin for setting in describe(layers)}
    assert origins["source.train_per_class"] == "--set"


def test_wrong_files_and_presets_are_named(tmp_path):
    with pytest.raises(UserError, match="no preset 'papr'.*paper"):
        load(tmp_path, preset="papr")
    with pytest.raises(UserError, match="missing.yaml cannot be read"):
        load(tmp_path, config=tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(UserError, match="'key: value'"):
        load(tmp_path, config=tmp_path / "list.yaml")
    (tmp_path / "tag.yaml").write_text("seed: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match="not YAML"):
        load(tmp_path, config=tmp_path / "tag.yaml")


def test_an_unknown_environment_key_is_not_passed_over(tmp_path):
    with pytest.raises(UserError, match="from environment"):
        load(tmp_path, environment={"DIFFUSEMIX_EDITING__STEPZ": "4"})
    meant = "DIFFUSEMIX_EDITING_STEPS .*Did you mean DIFFUSEMIX_EDITING__STEPS, with two"
    with pytest.raises(UserError, match=meant):
        load(tmp_path, environment={"DIFFUSEMIX_EDITING_STEPS": "4"})


def test_every_setting_is_documented(tmp_path):
    for setting in describe(load_layers(tmp_path)):
        assert setting.description.endswith("."), setting.key


@pytest.mark.parametrize(
    "setting",
    [
        "tracking.uri=http://me:hidden@host",
        "tracking.uri=https://hidden@host/mlflow",
        "tracking.uri=https://me:hid@den@host/mlflow",
        "tracking.uri=postgresql://me:hidden@host/mlflow",
        "tracking.address=http://me:hidden@host",
        "tracking.uri=https://me:hid/den@host/mlflow",
        "storage.edits=ftp://me:hidden@host/edits",
        "storage.edits=s3://me:hid/den@host/edits",
        "storage.edits=s3://hidden@host/edits",
    ],
)
def test_a_secret_in_a_setting_is_refused_and_not_repeated(setting, tmp_path):
    with pytest.raises(UserError, match="holds a .*by the environment") as refused:
        load(tmp_path, setting)
    assert "://…@host" in str(refused.value)
    assert "hidden" not in str(refused.value) and "den@" not in str(refused.value)


def test_a_token_in_an_address_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(UserError, match="by the environment") as refused:
        load(tmp_path, "tracking.uri=https://host/mlflow?api_token=hidden&x=1")
    assert "?api_token=…&x=1" in str(refused.value)


@pytest.mark.parametrize(
    "setting",
    [
        "storage.edits=sftp://me@host/edits",
        "storage.edits=sftp://host:22/home/me@corp/edits",
        "storage.edits=s3://bucket/edits@v2",
        "tracking.uri=sqlite:////home/me@corp.com/mlflow.db",
        "tracking.uri=https://host:8080/me@x?monkey=1",
    ],
)
def test_an_address_without_a_secret_is_taken(setting, tmp_path):
    load(tmp_path, setting)


def test_a_long_secret_is_not_repeated_either(tmp_path):
    with pytest.raises(UserError) as refused:
        load(tmp_path, f"storage.edits=ftp://me:{'hidden' * 50}@h/{'x' * 300}")
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("url", ["/tmp/edits", "file:///tmp/e", "simplecache::file:///tmp/e"])
def test_edits_are_shared_through_a_bucket_alone(url, tmp_path):
    with pytest.raises(UserError, match="write a bucket's URL, such as s3://"):
        load(tmp_path, f"storage.edits={url}")


def test_pictures_are_shown_where_somebody_said_so(tmp_path):
    assert load(tmp_path, preset="demo").thumbnails
    others = [name for name in preset_names() if name != "demo"]
    assert not any(load(tmp_path, preset=name).thumbnails for name in [*others, "none"])
    shown, hidden = (load(tmp_path, f"thumbnails={value}") for value in ("true", "false"))
    assert data_settings(shown) == data_settings(hidden)
    assert asked_of(shown.evaluation) == asked_of(hidden.evaluation)
    assert flatten(shown) != flatten(hidden)  # so the report is written anew
