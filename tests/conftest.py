"""What the tests share: small real images, settings that run in seconds, one project a test."""

import hashlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import chdir, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from diffusemix_pipeline.datasets.images import decode_square, png_bytes
from diffusemix_pipeline.datasets.manifest import Stage, read_stage
from diffusemix_pipeline.datasets.parts import Part, write_stage
from diffusemix_pipeline.datasets.storage import Layout
from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Two threads on small tensors wait for each other more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ASSETS = [
    "raw_dataset",
    "generated_images",
    "hybrid_images",
    "fractal_augmented_dataset",
    "trained_classifier",
    "robustness_report",
    "champion",
]
QUICK = [
    "size=32",
    "thumbnails=true",
    "source.path=digits",
    "source.train_per_class=2",
    "source.val_fraction=0.02",
    "source.test_fraction=0.02",
    "editing.prompts=[sunset, mosaic]",
    "editing.steps=2",
    "editing.batch_size=8",
    "mixing.fractal_count=3",
    "training.model=test_resnet",
    "training.steps=4",
    "training.batch_size=8",
    "training.validations=2",
    "evaluation.fgsm_epsilons=[2]",
    "evaluation.attack_images=8",
    "evaluation.autoattack_images=2",
    "evaluation.corruptions=[gaussian_noise, contrast]",
    "evaluation.severities=[3]",
    "evaluation.bootstrap_samples=1000",
    "checks.val_accuracy=0",
    "device=cpu",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first, so that a defect shows early."""
    items.sort(key=lambda item: "slow" in item.keywords)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Under CI a skipped test is a failure: what is not run is not known to work."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI: {report.longrepr}"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def trap(tmp_path_factory) -> Iterator[Trap]:
    """Give what is to be refused wherever it lies; fail where it was unpickled."""
    trap = Trap(tmp_path_factory.mktemp("trap") / "unpickled")
    yield trap
    assert not trap.mark.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.mark.exists()  # so it would have told


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", *quiet]
        )
        yield started
        started.close()


def quick_settings(*overrides: str) -> Settings:
    """Return settings under which the whole pipeline takes seconds."""
    return load_settings(Path("/nonexistent"), overrides=[*QUICK, *overrides], environment={})


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Return a smooth RGB picture that no other seed gives."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def write_classes(folder: Path, classes: list[str], images: int, seed: int = 0) -> Path:
    """Write `folder/<class>/<n>.png`."""
    for number, label in enumerate(classes):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for index in range(images):
            picture(seed + 1000 * number + index).save(folder / label / f"{index}.png")
    return folder


def write_digits(folder: Path, *, shuffled: bool = False, first: int = 0, last: int = 1797) -> Path:
    """Write some of scikit-learn's digits as `folder/<digit>/<n>.png`; shuffled, of wrong names."""
    bunch = load_digits()
    labels = np.random.default_rng(0).permutation(bunch.target) if shuffled else bunch.target
    for number in range(first, last):
        place = folder / str(labels[number])
        place.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((bunch.images[number] * 15).astype(np.uint8))
        grey.resize((32, 32)).convert("RGB").save(place / f"{number:04d}.png")
    return folder


def write_edits(raw: Stage, folder: Path, *, aside: Path) -> Stage:
    """Write a stage like `generated`: each training image's negative of 32 px, with its row."""
    images = []
    for row in raw.manifest().query("split == 'train'").to_dict("records"):
        image_id = f"{row['label']}/{Path(row['image_id']).name}"
        content = png_bytes(255 - decode_square(raw.files.read(row["file_name"]), 32))
        made = {
            "image_id": image_id,
            "file_name": f"{image_id}.png",
            "source_id": row["image_id"],
            "sha256": hashlib.sha256(content).hexdigest(),
            "edit_key": hashlib.sha256(content).hexdigest()[:32],
        }
        images.append(({**row, **made}, content))
    return write_images(folder, "generated", images, raw.layout["parts"], aside=aside)


def write_images(
    folder: Path,
    name: str,
    images: list[tuple[dict[str, Any], bytes]],
    parts: dict[str, int],
    *,
    aside: Path,
) -> Stage:
    """Write a stage folder of rows and the bytes of their files."""
    classes = sorted({row["label"] for row, _ in images})
    layout = Layout(packed=False, parts=parts)
    by_part = defaultdict(list)
    for row, content in images:
        by_part[layout.part_of(row["split"], row["source_id"])].append((row, content))
    with write_stage(
        folder, name=name, fingerprint="given", layout=layout, classes=classes, aside=aside
    ) as stage:
        made = [Part(part, uuid.uuid4().hex, of, len(of)) for part, of in by_part.items()]
        stage.write(made, _as_they_are, total=len(images), describe="")
    return read_stage(folder)


def _as_they_are(
    images: list[tuple[dict[str, Any], bytes]], threads: int
) -> list[tuple[dict[str, Any], bytes]]:
    return images


def tiny_editor(folder: Path, seed: int = 0) -> Path:
    """Save an InstructPix2Pix pipeline of the real classes, of tiny size, with random weights."""
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    tokenizer = _character_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_editor_xl(folder: Path) -> Path:
    """Save an InstructPix2Pix pipeline on SDXL of the real classes, as `tiny_editor`."""
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionXLInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = _character_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    StableDiffusionXLInstructPix2PixPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=16,
            in_channels=8,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=EulerAncestralDiscreteScheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def _character_tokenizer():
    """Return a CLIP tokenizer that knows letters alone."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: n for n, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def free_port() -> int:
    """Return a port of the loopback address on which nothing listens now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(project: Project, command: str, *options: str) -> Iterator[str]:
    """Run `diffusemix COMMAND` on a free port; end it with all its children.

    What it says is in COMMAND.log of the project.
    """
    port = free_port()
    log = (project.root / f"{command}.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "diffusemix_pipeline.cli", command, "--port", str(port), *options],
        cwd=project.root,
        env={k: v for k, v in os.environ.items() if k != "DAGSTER_HOME"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and server.poll() is None:
            with closing(socket.socket()) as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(f"{command} did not start:\n{Path(log.name).read_text()}")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        log.close()


def runs(project: Project) -> list[dg.DagsterRun]:
    """Return the runs, newest first."""
    with chdir(project.root), dg.DagsterInstance.from_config(str(project.root)) as instance:
        return list(instance.get_runs())


def wait_for(what: Callable[[], bool], seconds: float = 300) -> None:
    """Wait until `what` is so; fail after as long as a person would wait."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)
