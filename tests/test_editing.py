"""Promises: an edit follows from what it is and is paid for once; every checkpoint goes one way."""

import json
import shutil
import threading
from collections import Counter
from pathlib import Path

import diffusers
import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture, quick_settings, tiny_editor, tiny_editor_xl, write_classes
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from diffusemix_pipeline.datasets.dropped import Dropped
from diffusemix_pipeline.datasets.images import read_square, to_square
from diffusemix_pipeline.datasets.ingest import ingest
from diffusemix_pipeline.datasets.manifest import REJECTED, Stage, read_stage
from diffusemix_pipeline.datasets.storage import Layout, StoredFiles
from diffusemix_pipeline.editing import generate as generate_module
from diffusemix_pipeline.editing import instruct_pix2pix, planning, sampling
from diffusemix_pipeline.editing.editor import (
    Editor,
    editor_fingerprint,
    load_editor,
    locate_editor,
)
from diffusemix_pipeline.editing.gate import ACCEPTED, Judge
from diffusemix_pipeline.editing.generate import (
    Generated,
    LabelGate,
    collect_edits,
    generate,
    judged_edits,
    make_edits,
    numeric_profiles,
    prepare,
)
from diffusemix_pipeline.editing.instruct_pix2pix import (
    SCHEDULERS,
    InstructPix2PixEditor,
)
from diffusemix_pipeline.editing.planning import PlannedEdit, SourceImage, plan_edits
from diffusemix_pipeline.editing.sampling import Sampler
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import Ledger
from diffusemix_pipeline.identity import file_sha256
from diffusemix_pipeline.layers import load_settings, preset_names
from diffusemix_pipeline.mixing.stages import make_augmented, make_hybrids
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.settings import Settings

IMAGES = np.stack([to_square(picture(seed), 32) for seed in range(3)])
PROMPTS = ["sunset", "mosaic", "sunset"]
FIRST_DOG = "train/dog/0-"
GATE = "editing.gate.enabled=true"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A pipeline of the real classes, of tiny size, with random weights."""
    return tiny_editor(tmp_path_factory.mktemp("editor"))


def editor(weights: Path, *overrides: str) -> Editor:
    return load_editor(weights, quick_settings(*overrides).editing, "cpu")


def generated(tmp_path: Path, weights: Path, *overrides: str, images: int = 4) -> Generated:
    settings = quick_settings(
        "source.train_per_class=null", f"editing.editor={weights}", *overrides
    )
    source = write_classes(tmp_path / "data", ["cat", "dog"], images)
    raw = ingest(str(source), settings, tmp_path / "raw", aside=tmp_path / "aside", train_only=True)
    store = EditStore(tmp_path / "edits")
    return generate(
        raw, settings, tmp_path / "out", store=store, aside=tmp_path / "aside", device="cpu"
    )


def rows(result: Generated) -> set[tuple]:
    return set(result.stage.manifest()[["file_name", "sha256"]].itertuples(index=False, name=None))


@pytest.mark.parametrize("sampler", ["dpmsolver++", "euler_ancestral"])
def test_an_edit_depends_on_itself_and_not_on_order_or_neighbours(sampler, weights, monkeypatch):
    monkeypatch.setattr(instruct_pix2pix, "_CPU_LATENTS", 4 * 16**2)  # of 9 rows, 3 at once
    edit = editor(weights, f"editing.sampler={sampler}", "editing.guidance_until=0.5").edit
    images = IMAGES[[0, 1, 0]]  # a source twice, which is encoded once
    together = edit(images, PROMPTS, [1, 2, 3])
    assert together.shape == (3, 32, 32, 3)
    assert together.dtype == np.uint8
    assert np.array_equal(edit(images[::-1], PROMPTS[::-1], [3, 2, 1]), together[::-1])
    beside_others = edit(IMAGES[[2, 1, 2]], ["snowy", "mosaic", "sunset"], [9, 2, 8])
    assert np.array_equal(beside_others[1], together[1])
    assert not np.array_equal(edit(images, PROMPTS, [4, 5, 6]), together)


@hypothesis.settings(max_examples=12, deadline=None)
@given(
    members=st.lists(st.integers(0, 7), min_size=8, max_size=8),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@pytest.mark.parametrize("at_once", [32 * 32**2, 7 * 16**2])
def test_an_edit_is_the_same_in_whatever_batch_of_its_shape(members, dtype, at_once, weights):
    edit = editor(weights, f"editing.dtype={dtype}").edit
    images = np.stack([to_square(picture(seed), 32) for seed in range(8)])
    prompts = ["sunset", "mosaic"] * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instruct_pix2pix, "_CPU_LATENTS", at_once)
        alone = edit(images, prompts, range(8))
        mixed = edit(images[members], [prompts[i] for i in members], members)
    assert np.array_equal(mixed, alone[members])


@pytest.fixture(scope="module")
def weights_xl(tmp_path_factory) -> Path:
    return tiny_editor_xl(tmp_path_factory.mktemp("editor-xl"))


@pytest.mark.parametrize("family", ["weights", "weights_xl"])
@pytest.mark.parametrize("sampler", ["dpmsolver++", "euler_ancestral", "checkpoint"])
def test_the_sampling_loop_is_that_of_the_pipeline_in_diffusers(sampler, family, request):
    weights = request.getfixturevalue(family)
    wanted = quick_settings(
        f"editing.sampler={sampler}",
        "editing.steps=5",
        "editing.guidance=4",
        "editing.image_guidance=1.5",
        "editing.dtype=float32",
    ).editing
    pipeline = diffusers.DiffusionPipeline.from_pretrained(weights, use_safetensors=True)
    if sampler != "checkpoint":
        pipeline.scheduler = SCHEDULERS[sampler].from_config(pipeline.scheduler.config)
    theirs = pipeline(
        PROMPTS,
        image=torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2, 3)],
        num_inference_steps=5,
        guidance_scale=4,
        image_guidance_scale=1.5,
        output_type="np",
        height=32,
        width=32,
    ).images
    ours = load_editor(weights, wanted, "cpu").edit(IMAGES, PROMPTS, [1, 2, 3])
    assert np.abs(ours - theirs * 255).max() < 1.1


@pytest.mark.parametrize(
    ("steps", "since", "until", "branches"),
    [
        (4, 0, 1, [3, 3, 3, 3]),
        (4, 0, 0.5, [3, 3, 1, 1]),
        (3, 0, 0.5, [3, 3, 1]),
        (4, 0.25, 0.75, [1, 3, 3, 1]),
        (3, 0.3, 0.4, [1, 3, 1]),
    ],
)
def test_guidance_in_some_steps_leaves_one_branch_of_three_in_the_others(
    steps, since, until, branches, weights
):
    wanted = [f"editing.{name}" for name in (f"steps={steps}", f"guidance_from={since}")]
    wanted.append(f"editing.guidance_until={until}")
    cut = editor(weights, *wanted)
    evaluated = count_branches(cut)
    cut.edit(IMAGES, PROMPTS, [1, 2, 3])
    assert evaluated == [3 * each for each in branches]
    assert quick_settings(*wanted).editing.unet_evaluations == sum(branches)


def count_branches(its_editor: InstructPix2PixEditor) -> list[int]:
    """Return a list that grows by the batch of every call of the UNet."""
    evaluated: list[int] = []
    its_editor._unet.register_forward_pre_hook(
        lambda module, arguments: evaluated.append(len(arguments[0]))
    )
    return evaluated


def test_half_precision_changes_an_edit_by_a_hair(weights):
    exact, half = (
        editor(weights, f"editing.dtype={dtype}").edit(IMAGES, PROMPTS, [1, 2, 3]).astype(int)
        for dtype in ("float32", "bfloat16")
    )
    assert np.abs(exact - half).mean() < 1


def test_an_instruction_that_would_be_cut_off_is_refused(weights):
    editor(weights).check_instruction("A transformed version of image into sunset")
    with pytest.raises(UserError, match=r"has \d+ tokens; this editor reads 77"):
        editor(weights).check_instruction("sunset " * 80)


def test_the_fingerprint_follows_the_bytes_of_the_weights(weights, tmp_path):
    before = editor_fingerprint(weights, None)
    other = tiny_editor(tmp_path, seed=1)
    assert editor_fingerprint(other, None) != before
    copied = editor_fingerprint(other, None)
    for path in other.rglob("*"):
        path.touch()  # a new time is no new content
    assert editor_fingerprint(other, None) == copied


@pytest.mark.parametrize("content", [None, {"_class_name": "StableDiffusionPipeline"}])
def test_a_folder_that_holds_no_editor_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "model_index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="diffusemix editor list"):
        locate_editor(str(tmp_path), None)


def test_a_hub_id_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nobody/nothing is neither a folder here nor a model"):
        locate_editor("nobody/nothing", "0" * 40)


def test_a_hub_id_without_its_commit_is_refused():
    with pytest.raises(UserError, match=r"nobody/nothing is no folder.*by its commit.*revision"):
        locate_editor("nobody/nothing", None)
    with pytest.raises(UserError, match=r"editing\.revision = 'main'"):
        quick_settings("editing.revision=main")
    for preset in preset_names():
        editing = load_settings(Path("/nonexistent"), preset=preset, environment={}).editing
        assert editing.editor == "bundled" or editing.revision, preset


def test_the_fingerprint_leaves_out_what_other_programs_put_there(weights, tmp_path):
    before = editor_fingerprint(weights, None)
    shutil.copytree(weights, tmp_path / "editor")
    (weight,) = (tmp_path / "editor" / "unet").glob("*.safetensors")
    shutil.copy(weight, weight.with_suffix(".fp16.safetensors"))
    (tmp_path / "editor" / "safety_checker").mkdir()
    shutil.copy(weight, tmp_path / "editor" / "safety_checker" / "model.safetensors")
    (tmp_path / "editor" / "README.txt").write_text("hello")
    assert editor_fingerprint(tmp_path / "editor", None) == before
    weight.write_bytes(weight.read_bytes() + b"x")
    assert editor_fingerprint(tmp_path / "editor", None) != before


def test_pickled_weights_are_never_read(weights, tmp_path):
    shutil.copytree(weights, tmp_path / "editor")
    (safe,) = (tmp_path / "editor" / "unet").glob("*.safetensors")
    safe.unlink()
    torch.save({}, tmp_path / "editor" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no unet/\*.safetensors"):
        locate_editor(str(tmp_path / "editor"), None)


@pytest.mark.parametrize(
    ("part", "name"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")]
)
def test_weights_in_several_files_are_safetensors_too(part, name, weights, trap, tmp_path):
    folder = Path(shutil.copytree(weights, tmp_path / "editor")) / part
    torch.save(trap, folder / "part.bin")
    (safe,) = folder.glob("*.safetensors")
    for shard in ("part.bin", f"../unet/{safe.name}"):
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(safe), shard)}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=f"names {shard}, which is no safetensors file"):
            locate_editor(str(tmp_path / "editor"), None)


@pytest.mark.parametrize("part", ["unet", "_class_name"])
def test_code_that_lies_with_a_checkpoint_is_never_run(part, weights, tmp_path):
    folder = Path(shutil.copytree(weights, tmp_path / "editor"))
    named = json.loads((folder / "model_index.json").read_text())
    named[part] = ["mine", "UNet2DConditionModel"]
    (folder / "model_index.json").write_text(json.dumps(named))
    for place in (folder, folder / "unet"):
        (place / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="code of its own, mine, for its unet|no editor that is"):
        locate_editor(str(folder), None)
    with pytest.raises((ValueError, UserError)):  # nor where nobody looked before
        load_editor(folder, quick_settings().editing, "cpu")
    assert not (tmp_path / "ran").exists()


def test_a_pickled_lora_is_never_read(weights, trap, tmp_path):
    torch.save(trap, tmp_path / "lora.safetensors")
    editing = quick_settings(f"editing.lora={tmp_path / 'lora.safetensors'}").editing
    with pytest.raises(UserError, match="fits no part"):
        load_editor(weights, editing, "cpu")


def test_edits_that_are_no_numbers_are_no_black_images(weights):
    broken = editor(weights)
    broken._unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="no numbers for 3 of 3 edits"):
        broken.edit(IMAGES, PROMPTS, [1, 2, 3])


# Batches


@pytest.mark.parametrize(
    "told",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("could not create a primitive"),
        MemoryError(),
    ],
)
def test_where_memory_does_not_suffice_the_batch_is_halved_and_the_run_says_so(
    told, weights, tmp_path
):
    edits = editor(weights)
    real = edits._unet.forward

    def small_device(sample: torch.Tensor, *arguments, **more):
        if len(sample) > 3 * 2:  # three branches of two edits
            raise told
        return real(sample, *arguments, **more)

    edits._unet.forward = small_device
    store = EditStore(tmp_path / "store")
    with pytest.warns(UserWarning, match="for 8 edits at once: going on with 4, which is another"):
        Sampler(edits, "cpu", quick_settings(), 8).make(planned(tmp_path, 5), 5, store, silent)
    profiles, said = store.profiles(), store.records()
    sizes = {key: profiles[record.profile]["batch_size"] for key, record in said.items()}
    assert sizes == {f"{n:032x}": 2 for n in range(5)}
    halved = {key: read_square(store.path(key), 32) for key in store}
    other = EditStore(tmp_path / "other")
    Sampler(editor(weights), "cpu", quick_settings(), 2).make(
        planned(tmp_path, 5), 5, other, silent
    )
    assert all(np.array_equal(halved[key], read_square(other.path(key), 32)) for key in halved)


def test_too_little_memory_for_one_edit_names_what_to_do(weights, tmp_path):
    edits = editor(weights)

    def no_device(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    edits._unet.forward = no_device
    with (
        pytest.warns(UserWarning, match="for 2 edits at once"),
        pytest.raises(UserError, match="too little memory for one edit of 32 px"),
    ):
        store = EditStore(tmp_path / "store")
        Sampler(edits, "cpu", quick_settings(), 2).make(planned(tmp_path, 2), 2, store, silent)


def test_a_device_samples_while_files_are_written(tmp_path):
    sampling_again = threading.Event()

    class Accelerator:
        """Tells when it is busy with a second batch."""

        batches = 0

        def edit(self, images, instructions, seeds):
            self.batches += 1
            if self.batches == 2:
                sampling_again.set()
            return images

        def profile(self):
            return {}

    class SlowDisk(EditStore):
        def put_file(self, key, content, profile):
            """Keep the first batch waiting until the device has the second."""
            assert sampling_again.wait(60)
            return super().put_file(key, content, profile)

    store = SlowDisk(tmp_path / "store")
    Sampler(Accelerator(), "cuda", quick_settings(), 2).make(planned(tmp_path, 4), 4, store, silent)
    assert len(list(store)) == 4


def planned(folder: Path, count: int) -> list[PlannedEdit]:
    """Return edits of as many pictures, written into the folder."""
    pictures = write_classes(folder / "pictures", ["all"], count) / "all"
    files = StoredFiles(pictures)
    sources = [
        SourceImage(str(n), "all", files, f"{n}.png", file_sha256(pictures / f"{n}.png"), "")
        for n in range(count)
    ]
    return [
        PlannedEdit(f"{n:032x}", source, "mosaic", "into mosaic", 0, 0, seed=n)
        for n, source in enumerate(sources)
    ]


# The stage


def test_every_training_image_gets_its_edits_with_all_that_made_them(weights, tmp_path):
    result = generated(tmp_path, weights, "editing.copies=2")
    manifest = result.stage.manifest()
    assert result.made == len(manifest) == 2 * 4 * 2
    assert manifest["label"].value_counts().to_dict() == {"cat": 8, "dog": 8}
    assert manifest["edit_key"].is_unique
    assert set(manifest["prompt"]) <= {"sunset", "mosaic"}
    assert (manifest["source_id"].str.split("/").str[1] == manifest["label"]).all()
    for name in manifest["file_name"]:
        assert (result.stage.folder / name).exists()


def test_all_prompts_are_used_where_the_policy_says_so(weights, tmp_path):
    manifest = generated(tmp_path, weights, "editing.prompts_per_image=all").stage.manifest()
    assert set(manifest.groupby("source_id")["prompt"].agg(frozenset)) == {
        frozenset({"sunset", "mosaic"})
    }


def test_nothing_changed_nothing_done(weights, tmp_path):
    before = rows(generated(tmp_path, weights))
    again = generated(tmp_path, weights)
    assert again.made == 0
    assert again.stage.reused
    assert rows(again) == before


@pytest.fixture
def evaluations(monkeypatch) -> list[int]:
    """Return a list that grows by the batch of every call of any UNet."""
    counted: list[int] = []
    real = UNet2DConditionModel.forward

    def forward(self, sample: torch.Tensor, *arguments, **more):
        counted.append(len(sample))
        return real(self, sample, *arguments, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    return counted


@pytest.mark.parametrize("policy", ["one", "all"])
def test_exactly_what_is_new_is_paid_for(policy, weights, tmp_path, evaluations):
    own = [f"editing.prompts_per_image={policy}", "editing.batch_size=1"]
    an_edit = quick_settings(*own).editing.unet_evaluations

    def paid(*overrides: str, images: int = 4) -> int:
        """Return how many edits a dataset's UNet evaluations amount to."""
        evaluations.clear()
        result = generated(tmp_path, weights, *own, *overrides, images=images)
        settings = quick_settings(*own, *overrides)
        raw, aside = read_stage(tmp_path / "raw"), tmp_path / "aside"
        for name, make, more in (
            ("hybrid", make_hybrids, {}),
            ("augmented", make_augmented, {"fractal_cache": tmp_path / "fractals"}),
        ):
            stage = make(raw, result.stage, settings, tmp_path / name, aside=aside, **more)
            assert stage.counts["images"] == result.stage.counts["images"]
        assert sum(evaluations) == result.made * an_edit
        return result.made

    prompts = 2 if policy == "all" else 1
    assert paid() == 8 * prompts
    for redrawn in (
        "mixing.lam=0.4",
        "mixing.masks=[top, bottom]",
        "mixing.seam=4",
        "mixing.fractal_count=3",
        "training.steps=9",
    ):
        assert paid(redrawn) == 0
    assert paid(images=5) == 2 * prompts
    before = rows(generated(tmp_path, weights, *own))
    new = paid("editing.prompts=[sunset, mosaic, snowy, rainbow]")
    after = generated(tmp_path, weights, *own, "editing.prompts=[sunset, mosaic, snowy, rainbow]")
    assert new == after.stage.manifest()["prompt"].isin(["snowy", "rainbow"]).sum()
    assert 0 < new == len(rows(after) - before)


def test_edits_that_came_with_the_data_are_not_paid_for_again(weights, tmp_path):
    before = rows(generated(tmp_path, weights))
    shutil.rmtree(tmp_path / "edits")
    changed = tmp_path / "out" / min(before)[0]
    changed.unlink()
    changed.write_bytes(b"not what the manifest says")
    more = generated(tmp_path, weights, images=5)
    assert more.made == 2 + 1
    assert before < rows(more)
    made_by = numeric_profiles(more.stage, EditStore(tmp_path / "edits"))
    assert sorted(made_by.values()) == [3, 7]
    assert any("came with the data" in profile for profile in made_by)


def test_a_drop_while_a_run_in_a_clone_is_at_work_pays_for_nothing(weights, tmp_path):
    asked = "source.train_per_class=null", f"editing.editor={weights}", "storage.shard_images=2"
    edit = generated(tmp_path, weights, *asked[2:], images=10).stage.manifest().iloc[0]
    shutil.rmtree(tmp_path / "edits")
    out, store, settings = tmp_path / "out", EditStore(tmp_path / "edits"), quick_settings(*asked)
    raw = read_stage(tmp_path / "raw")
    whole = prepare(plan_edits(raw, settings), out, store, gate=None)
    assert (len(whole.lacking), whole.there) == (0, 20)
    assert not list(store)  # as nothing is to be made
    plan = plan_edits(raw, settings, Dropped(edits=frozenset({edit["edit_key"]})))
    prepared = prepare(plan, out, store, gate=None)
    assert len(prepared.lacking) == len(plan) == 20
    assert prepared.there == 0
    assert make_edits(prepared.lacking, store=store, device="cpu") == 0
    collect_edits(plan, out, store, None, tmp_path / "aside")
    assert prepare(plan, out, store, gate=None).there == 19  # what was dropped is no image


@pytest.mark.parametrize("layout", ["files", "tar"])
def test_what_new_images_do_not_touch_is_neither_planned_nor_looked_at(
    layout, weights, tmp_path, monkeypatch
):
    of_two = "storage.shard_images=2", f"storage.format={layout}"
    old = generated(tmp_path, weights, *of_two, images=10).stage.manifest()
    shutil.rmtree(tmp_path / "edits")  # as in a clone
    sources, plan_one = set(), planning._planned

    def noted(source, *how):
        sources.add(source.image_id)
        return plan_one(source, *how)

    monkeypatch.setattr(planning, "_planned", noted)
    more = generated(tmp_path, weights, *of_two, images=11)
    new = more.stage.manifest()
    assert more.made == 2
    assert set(old["image_id"]) < set(new["image_id"])
    place = Layout(**more.stage.layout).part_of
    added = set(new["source_id"]) - set(old["source_id"])
    touched = {place("train", source) for source in added}
    there = new[new["source_id"].map(lambda source: place("train", source) in touched)]
    assert 2 <= len(there) < len(new)
    assert sources == set(there["source_id"])
    assert set(EditStore(tmp_path / "edits")) == set(there["edit_key"])
    assert not any(more.stage.differences()[1:])


def test_the_number_of_workers_changes_no_byte(weights, tmp_path, monkeypatch):
    whole = []
    for workers in (1, 3):
        monkeypatch.setattr(sampling, "workers_on", lambda device, workers=workers: workers)
        whole.append(rows(generated(tmp_path / str(workers), weights, "editing.batch_size=2")))
    assert whole[0] == whole[1]


def test_a_damaged_edit_is_made_anew_and_no_other(weights, tmp_path):
    every = "editing.prompts_per_image=all"
    before = rows(generated(tmp_path, weights, every))
    store = EditStore(tmp_path / "edits")
    damaged = store.path(next(iter(store)))
    damaged.unlink()
    damaged.write_bytes(b"torn")
    (tmp_path / "out").rename(tmp_path / "old")  # so that the stage is made again
    with pytest.warns(UserWarning, match=f"1 stored edits .* the first is {damaged.stem}"):
        again = generated(tmp_path, weights, every)
    assert again.made == 1
    assert rows(again) == before


def test_an_image_that_changed_since_it_was_read_is_named(weights, tmp_path):
    raw, settings = ingested(tmp_path, weights)
    changed = raw.folder / raw.manifest()["file_name"][0]
    changed.write_bytes(changed.read_bytes() + b"more")
    store, aside = EditStore(tmp_path / "edits"), tmp_path / "aside"
    with pytest.raises(UserError, match=f"{changed} is not as it was when the images were read"):
        generate(raw, settings, tmp_path / "out", store=store, aside=aside, device="cpu")


@pytest.mark.parametrize("gate", [None, GATE])
def test_an_edit_that_is_wanted_again_before_a_run_collects_is_named(gate, weights, tmp_path):
    raw, settings = ingested(tmp_path, weights, *([gate] if gate else []))
    store, aside = EditStore(tmp_path / "edits"), tmp_path / "aside"
    plan = plan_edits(raw, settings)
    taken_out = next(iter(plan))
    without = plan_edits(raw, settings, Dropped(edits=frozenset({taken_out.key})))
    verdicts = plan.verdicts(tmp_path / "gate")
    judge = LabelGate(lambda sources, originals, edits: [ACCEPTED] * len(edits), verdicts, int)
    make_edits(without, store=store, device="cpu", gate=judge if gate else None)
    with pytest.raises(UserError, match=f"{taken_out.source.image_id} lacks .* Run it again"):
        collect_edits(plan, tmp_path / "out", store, verdicts if gate else None, aside)


def test_an_edit_that_was_pruned_before_a_run_collects_is_named(weights, tmp_path):
    raw, settings = ingested(tmp_path, weights)
    store, aside = EditStore(tmp_path / "edits"), tmp_path / "aside"
    plan = plan_edits(raw, settings)
    make_edits(plan, store=store, device="cpu")
    pruned = next(iter(plan))
    store.remove([pruned.key])
    with pytest.raises(UserError, match=f"{pruned.source.image_id} lacks .* Run it again"):
        collect_edits(plan, tmp_path / "out", store, None, aside)
    assert make_edits(plan, store=store, device="cpu") == 1
    assert collect_edits(plan, tmp_path / "out", store, None, aside).counts["images"] == len(plan)


def test_cut_off_work_goes_on_where_it_was(weights, tmp_path, monkeypatch):
    few = "editing.batch_size=3"
    whole = rows(generated(tmp_path / "whole", weights, few))
    real, calls = InstructPix2PixEditor.edit, []

    def cut_off_in_the_second_batch(self, images, instructions, seeds):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, images, instructions, seeds)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(InstructPix2PixEditor, "edit", cut_off_in_the_second_batch)
        generated(tmp_path / "cut", weights, few)
    assert not (tmp_path / "cut" / "out").exists()
    resumed = generated(tmp_path / "cut", weights, few)
    assert 3 <= resumed.made <= 8 - 3  # the next batch may have been in work
    assert rows(resumed) == whole


def test_the_bytes_of_an_edit_lie_on_disk_once(weights, tmp_path):
    result = generated(tmp_path, weights)
    store = EditStore(tmp_path / "edits")
    for row in result.stage.manifest().itertuples():
        kept, shown = store.path(row.edit_key), result.stage.folder / row.file_name
        assert kept.stat().st_ino == shown.stat().st_ino


# The gate


def test_what_the_gate_rejects_is_made_anew_and_dropped_in_the_end(weights, tmp_path):
    asked = []

    def judge(sources, originals, edits):
        """Reject cats once, and the dog that is called 0 for ever."""
        said = []
        for source, original, edit in zip(sources, originals, edits, strict=True):
            assert original.shape == edit.shape == (32, 32, 3)
            again = asked.count(source.image_id) > 0
            asked.append(source.image_id)
            wrong = source.image_id.startswith(FIRST_DOG) or (source.label == "cat" and not again)
            said.append("label" if wrong else ACCEPTED)
        return said

    result = gated(tmp_path, weights, judge)
    manifest = result.stage.manifest()
    attempts = manifest.groupby("label")["attempt"]
    assert attempts.agg(lambda column: column.tolist()).to_dict() == {
        "cat": [1, 1, 1, 1],
        "dog": [0, 0, 0],
    }
    assert not manifest["source_id"].str.startswith(FIRST_DOG).any()
    assert set(manifest["verdict"]) == {ACCEPTED}
    assert result.made == len(asked) == 2 * 4 + 3 + 3  # cats twice, a dog thrice
    rejected = pd.read_parquet(result.stage.folder / REJECTED)
    assert rejected["verdict"].tolist() == ["label"] * (4 + 3)
    assert sorted(rejected.query("label == 'dog'")["attempt"]) == [0, 1, 2]
    assert len(judged_edits(result.stage)) == len(asked)

    (tmp_path / "out").rename(tmp_path / "old")
    again = gated(tmp_path, weights, lambda *asked: pytest.fail("judged twice"))
    assert again.made == 0
    assert again.stage.version == result.stage.version


@pytest.mark.parametrize("cut_off", [False, True])
def test_one_picture_under_two_labels_is_judged_under_each(cut_off, weights, tmp_path):
    source = write_classes(tmp_path / "data", ["cat", "dog"], 4)
    shutil.copy(source / "cat" / "0.png", source / "dog" / "cat.png")
    left = [1 if cut_off else 99]

    def judge(sources, originals, edits):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return [
            "label" if source.image_id.startswith("train/dog/cat") else ACCEPTED
            for source in sources
        ]

    if cut_off:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(generate_module, "_JUDGED_AT_ONCE", 1)
            gated(tmp_path, weights, judge)
        left[0] = 99
    manifest = gated(tmp_path, weights, judge).stage.manifest()
    assert manifest["label"].value_counts().to_dict() == {"cat": 4, "dog": 4}
    assert not manifest["source_id"].str.startswith("train/dog/cat").any()


def test_a_new_test_image_keeps_the_verdicts_and_a_new_training_image_does_not(weights, tmp_path):
    source, settings = tmp_path / "data", ingested(tmp_path, weights, GATE)[1]

    def gate(of_split: str, images: int) -> str | None:
        write_classes(source / of_split, ["cat", "dog"], images, seed=len(of_split) * 100)
        aside = tmp_path / "aside"
        return plan_edits(
            ingest(str(source), settings, tmp_path / "raw", aside=aside), settings
        ).gate

    shutil.rmtree(source)
    for split in ("val", "test"):
        write_classes(source / split, ["cat", "dog"], 2, seed=len(split) * 100)
    before = gate("train", 4)
    assert gate("test", 3) == before
    assert gate("train", 5) != before


def test_where_nothing_is_accepted_a_person_is_told_what_to_do(weights, tmp_path):
    with pytest.raises(UserError, match="rejected all 24 edits"):
        gated(tmp_path, weights, lambda sources, *pixels: ["label"] * len(sources))


def test_another_seed_more_is_tried_where_a_person_asks_for_it(weights, tmp_path):
    def reject_twice(sources, originals, edits):
        asked.extend(source.image_id for source in sources)
        return [ACCEPTED if asked.count(s.image_id) > 2 else "label" for s in sources]

    asked: list[str] = []
    with pytest.raises(UserError, match="rejected all 16 edits"):
        gated(tmp_path, weights, reject_twice, "editing.gate.max_attempts=2")
    more = gated(tmp_path, weights, reject_twice)
    assert more.made == more.stage.counts["images"] == 8
    assert gated(tmp_path, weights, reject_twice).stage.reused
    few = gated(tmp_path, weights, reject_twice, "editing.gate.max_attempts=9")
    assert not few.stage.reused
    assert few.made == 0


def test_a_clone_takes_verdicts_and_makes_nothing_to_be_rejected_again(weights, tmp_path):
    def no_first(sources, originals, edits):
        return ["label" if s.image_id.startswith(FIRST_DOG) else ACCEPTED for s in sources]

    first = gated(tmp_path, weights, no_first)
    assert first.made == 7 + 3
    shutil.rmtree(tmp_path / "edits")
    shutil.rmtree(tmp_path / "gate")
    every = "editing.prompts=[sunset, mosaic, snowy]"
    clone = gated(tmp_path, weights, no_first, every)
    new = clone.stage.manifest()["prompt"] == "snowy"
    rejected = pd.read_parquet(clone.stage.folder / REJECTED)["prompt"] == "snowy"
    assert clone.made == new.sum() + rejected.sum()
    assert rows(first) - rows(clone) == {
        row for row in rows(first) if row[0] not in set(clone.stage.manifest()["file_name"])
    }


def test_shards_judge_and_retry_alike(weights, tmp_path):
    def by_content(sources, originals, edits):
        return ["label" if edit.sum() % 2 else ACCEPTED for edit in edits]

    whole = gated(tmp_path, weights, by_content)
    raw, settings = ingested(tmp_path, weights, GATE)
    plan, store = plan_edits(raw, settings), EditStore(tmp_path / "other")
    gate = LabelGate(by_content, Ledger(tmp_path / "others"), lambda: 1)
    made = [
        make_edits(plan, store=store, device="cpu", gate=gate, shard=shard, shards=3)
        for shard in (2, 0, 1)
    ]
    assert sum(made) == whole.made
    aside = tmp_path / "aside"
    stage = collect_edits(plan, tmp_path / "sharded", store, gate.verdicts, aside)
    assert stage.version == whole.stage.version


def test_the_gate_changes_no_edit_and_while_off_no_stage(weights, tmp_path):
    raw, off = ingested(tmp_path, weights, "editing.gate.max_attempts=9")
    _, on = ingested(tmp_path, weights, GATE)
    _, plain = ingested(tmp_path, weights)
    assert plan_edits(raw, off).fingerprint == plan_edits(raw, plain).fingerprint
    assert plan_edits(raw, on).fingerprint != plan_edits(raw, plain).fingerprint
    assert list(plan_edits(raw, on)) == list(plan_edits(raw, plain))


def ingested(tmp_path: Path, weights: Path, *overrides: str) -> tuple[Stage, Settings]:
    settings = quick_settings(
        "source.train_per_class=null", f"editing.editor={weights}", *overrides
    )
    source = write_classes(tmp_path / "data", ["cat", "dog"], 4)
    aside = tmp_path / "aside"
    raw = ingest(str(source), settings, tmp_path / "raw", aside=aside, train_only=True)
    return raw, settings


def gated(tmp_path: Path, weights: Path, judge: Judge, *overrides: str) -> Generated:
    raw, settings = ingested(tmp_path, weights, GATE, *overrides)
    return generate(
        raw,
        settings,
        tmp_path / "out",
        store=EditStore(tmp_path / "edits"),
        aside=tmp_path / "aside",
        device="cpu",
        gate_of=lambda plan: LabelGate(judge, plan.verdicts(tmp_path / "gate"), lambda: 1),
    )


# Share and size


def test_what_an_edit_does_not_depend_on_is_no_part_of_its_key(weights, tmp_path):
    def keys(*overrides: str) -> list[str]:
        plan = plan_edits(*ingested(tmp_path, weights, "editing.steps=10", *overrides))
        return [edit.key for edit in plan]

    half = keys("editing.guidance_until=0.5")
    assert keys("editing.guidance_until=0.41") == half  # five guided steps, both
    assert keys("editing.guidance_until=0.6") != half
    assert keys("editing.guidance_until=0.5", "editing.guidance_from=0.1") != half
    without = keys("editing.guidance=1")
    assert keys("editing.guidance_from=0.41", "editing.guidance_until=0.5") == without
    assert keys("editing.guidance=1", "editing.image_guidance=2") == without
    assert keys("editing.guidance=1.1") != keys("editing.guidance=1.1", "editing.image_guidance=2")


@pytest.mark.parametrize(
    ("images", "share", "edited"), [(100, 0.07, 7), (100, 0.14, 14), (3, 0.5, 2)]
)
def test_a_share_is_rounded_up_and_not_by_float_noise(images, share, edited):
    sources = pd.DataFrame({"label": "cat", "sha256": [f"{n}" for n in range(images)]})
    assert len(planning._share(sources, share, 0)) == edited


def test_a_share_of_each_class_is_edited_and_a_larger_share_holds_it(weights, tmp_path):
    kept = []
    for share in (0.25, 0.5, 1):
        raw, settings = ingested(tmp_path, weights, f"editing.share={share}")
        edits = list(plan_edits(raw, settings))
        by_class = Counter(edit.source.label for edit in edits)
        assert by_class == {"cat": 4 * share, "dog": 4 * share}
        kept.append({edit.key for edit in edits})
    assert kept[0] < kept[1] < kept[2]


def test_small_images_are_enlarged_for_editing_and_brought_back(weights, tmp_path):
    raw, settings = ingested(tmp_path, weights, "editing.min_side=64")
    plain = plan_edits(raw, ingested(tmp_path, weights)[1])
    plan = plan_edits(raw, settings)
    assert not {edit.key for edit in plan} & {edit.key for edit in plain}
    edits = load_editor(weights, settings.editing, "cpu")
    seen, made = [], []
    real = edits.edit

    def spied(images, *more):
        seen.append(images)
        made.append(real(images, *more))
        return made[-1]

    edits.edit = spied
    store = EditStore(tmp_path / "edits")
    Sampler(edits, "cpu", settings, 8).make(plan, len(plan), store, silent)
    assert {images.shape[1:] for images in seen} == {(64, 64, 3)}
    stage = collect_edits(plan, tmp_path / "out", store, None, tmp_path / "aside")
    rows = stage.manifest().set_index("edit_key")
    assert set(rows["width"]) == {32}
    for row, edit in zip(plan, np.concatenate(made)[: len(plan)], strict=True):
        kept = Image.open(stage.folder / rows.loc[row.key, "file_name"])
        assert kept.size == (32, 32)
        small = Image.fromarray(edit).resize((32, 32), Image.Resampling.LANCZOS)
        assert np.array_equal(kept, small)


def test_small_maps_alone_are_laid_out_by_channel_for_their_norms(weights):
    editor = load_editor(weights, quick_settings("editing.steps=1").editing, "cpu")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in editor._unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(lambda norm, taken, made: seen.append((taken[0], made)))
    editor.edit(np.zeros((2, 64, 64, 3), np.uint8), ["a", "b"], [0, 1])
    small = {True: 0, False: 0}
    for taken, made in seen:
        if taken.ndim == 4:
            small[taken[0, 0].numel() < 1024] += 1
            assert taken.is_contiguous() == (taken[0, 0].numel() < 1024)
            assert made.is_contiguous(memory_format=torch.channels_last)
    assert min(small.values()) > 0
