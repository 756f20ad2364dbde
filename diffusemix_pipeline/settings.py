"""Every setting of the pipeline: one typed tree and its documentation.

What belongs here: a value that a user has a reason to change. What does not: where values come from
(`layers.py`), paths of the project (`project.py`), and anything that needs torch.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from diffusemix_pipeline.errors import without_secrets
from diffusemix_pipeline.own_code import is_own

# Passwords may hold slashes. A bucket has no user; an sftp server has one, who is no secret.
_SECRET_OF_BUCKET = re.compile(r"^(s3a?|gcs?|gs)://[^/]*@|://[^/@]*:(?!\d+/).*@")
PAPER_PROMPTS = [
    "autumn",
    "snowy",
    "watercolor art",
    "sunset",
    "rainbow",
    "aurora",
    "mosaic",
    "ukiyo-e",
    "a sketch with crayon",
]

Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]


def _matching(pattern: str, told: str) -> AfterValidator:
    """Refuse text that does not match, in words."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(told)
        return text

    return AfterValidator(check)


Commit = Annotated[
    str,
    _matching("[0-9a-f]{40}", "write all 40 hex digits of the commit, and no branch or short form"),
]
Owner = Annotated[
    str, _matching(r"team:.+|[^@\s]+@[^@\s]+\.[^@\s]+", "write an email address, or team:NAME")
]
Device = Annotated[
    str, _matching(r"auto|cpu|cuda(:\d+)?|mps", "use auto, cpu, cuda, cuda:N (the GPU N) or mps")
]
Mask = Literal["left", "right", "top", "bottom"]
ARMS = (
    "vanilla",
    "trivialaugment",
    "randaugment",
    "mixup",
    "cutmix",
    "augmix",
    "pixmix",
    "generated_only",
    "hybrid_only",
    "diffusemix",
    "diffusemix_online",
    "diffusemix+cutmix",
)


def _known_arm(arm: str) -> str:
    if arm not in ARMS and not is_own(arm):
        raise ValueError(f"use {', '.join(ARMS)}, or a Python file that defines an augmentation")
    return arm


Arm = Annotated[str, AfterValidator(_known_arm)]
"""One of ARMS, in whose order arms are told, or a Python file of the user's own."""
Optimizer = Literal["adamw", "sgd"]
Executor = Literal["in_process", "multiprocess", "ray"]
Corruption = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]


class Section(BaseModel):
    """A part of the tree: unknown keys are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Section):
    """Where labelled images come from and how they are split."""

    path: str = Field(
        "",
        description="A folder of class folders, or of train[/val]/test folders of class folders; "
        "cifar10, cifar100, tiny_imagenet, imagenet, flowers102, stanford_cars, fgvc_aircraft or "
        "cub200, as published (docs/data.md); 'digits' for the bundled sample; or a Python file "
        "that lists images (docs/extending.md). Empty: what data.dvc pins or data/ holds, else "
        "'digits'.",
    )
    archives: str = Field(
        "",
        description="Folder in which a published dataset's archives lie or are unpacked, or to "
        "which they are downloaded; empty: .diffusemix/published.",
    )
    train_per_class: int | None = Field(
        None, gt=0, description="At most this many training images a class (few-shot); empty: all."
    )
    val_fraction: float = Field(
        0.15, gt=0, lt=1, description="Share of the training images held out where there is no val."
    )
    test_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the images held out where no test folder is; a val folder stays.",
    )
    # The default is datasets/images.py's MAX_PIXELS, which stands above and loads PIL and numpy.
    max_pixels: int = Field(
        64_000_000,
        gt=0,
        description="A larger image is set aside unread (decompression bombs). `predict` and "
        "mixing.fractal_dir keep the default.",
    )


class Storage(Section):
    """Where and how images lie; no image follows from it."""

    format: Literal["auto", "files", "tar"] = Field(
        "auto",
        description="Image files in class folders, or tar shards in WebDataset's naming; auto: "
        "shards from 20,000 images on.",
    )
    shard_images: int = Field(
        1000,
        gt=0,
        description="At most about so many source images a shard, or a process at a time.",
    )
    edits: str = Field(
        "",
        description="Where machines share edits: a bucket's URL, such as s3://bucket/edits, of "
        "any kind that fsspec opens. Secrets come from the environment. Empty: edits stay here.",
    )

    @field_validator("edits")
    @classmethod
    def _is_a_bucket(cls, edits: str) -> str:
        if _SECRET_OF_BUCKET.search(edits):
            raise ValueError("holds a key or password: give secrets by the environment")
        # fsspec takes a::b for one storage over another, which may be a folder.
        if edits and (urlsplit(edits).scheme in ("", "file", "local") or "::" in edits):
            raise ValueError("write a bucket's URL, such as s3://bucket/edits")
        return edits


class Gate(Section):
    """Which edits are thrown away and made anew from another seed."""

    enabled: bool = Field(
        False,
        description="Judge every edit: by its pixels, and by classifiers that never saw its "
        "source. They are trained first, one a fold, by the recipe of `training`.",
    )
    false_reject_rate: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="Share of unseen real images of a class that its threshold may reject.",
    )
    max_attempts: int = Field(
        3, gt=0, description="Seeds tried for an edit before the image goes without it."
    )
    min_change: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Least mean absolute difference between edit and original; 1: black to white.",
    )
    max_change: float = Field(
        0.75,
        ge=0,
        le=1,
        description="Most of the original's structure that an edit may lose; 1: any edit passes.",
    )
    folds: int = Field(
        5, ge=2, description="Parts of the training images; one classifier leaves each part out."
    )


class Editing(Section):
    """The diffusion model that turns an image and a prompt into an edit."""

    editor: str = Field(
        "bundled",
        min_length=1,
        description="'bundled' (a small stand-in), a folder, or a hub id such as "
        "timbrooks/instruct-pix2pix, in diffusers' format: `diffusemix editor list`; or a Python "
        "file that defines one (docs/extending.md).",
    )
    revision: Commit | None = Field(
        None,
        description="The commit of a hub id, 40 hex digits: without it nothing of the hub is "
        "loaded, as a name or a branch may hold other files tomorrow.",
    )
    lora: str = Field(
        "",
        description="Low-rank weights to add to the editor's: a .safetensors file, or "
        "owner/name@COMMIT/FILE.safetensors on the hub; empty: none.",
    )
    prompts: list[Prompt] = Field(
        PAPER_PROMPTS, min_length=1, description="What an image may be turned into."
    )
    template: str = Field(
        "A transformed version of image into {prompt}",
        description="The instruction; {prompt} stands for the prompt.",
    )
    prompts_per_image: Literal["one", "all"] = Field(
        "one", description="one: each copy draws a prompt; all: each copy uses every prompt."
    )
    copies: int = Field(1, gt=0, description="Edits an image (a prompt, where all are used).")
    share: float = Field(
        1,
        gt=0,
        le=1,
        description="Share of the training images that are edited, the same of every class; "
        "`diffusemix plan --budget` says which share fits.",
    )
    min_side: int = Field(
        0,
        ge=0,
        le=2048,
        multiple_of=8,
        description="Below this side in px, images are enlarged for editing and brought back.",
    )
    sampler: Literal["dpmsolver++", "euler_ancestral", "checkpoint"] = Field(
        "dpmsolver++",
        description="The diffusion sampler; checkpoint: the scheduler that the editor ships.",
    )
    steps: int = Field(10, gt=0, le=1000, description="Sampling steps.")
    guidance: float = Field(1.5, ge=1, description="Guidance scale of the text.")
    image_guidance: float = Field(1.2, ge=1, description="Guidance scale of the image.")
    guidance_from: float = Field(
        0, ge=0, lt=1, description="Share of the steps, from the first, that are not guided yet."
    )
    guidance_until: float = Field(
        1, gt=0, le=1, description="Share of the steps, from the first, after which none is guided."
    )
    batch_size: int = Field(
        32, gt=0, description="Edits sampled at once, by editors that can; it is part of the bytes."
    )
    shards: int = Field(1, gt=0, le=200, description="Steps that share the editing of a run.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What the editor computes in; auto: half precision where it is fast."
    )
    compile: bool = Field(False, description="Compile the denoiser: pays on a GPU for many edits.")
    gate: Gate = Gate()

    @property
    def guided_steps(self) -> range:
        """The steps of InstructPix2Pix, from 0, that evaluate all three branches."""
        if self.guidance == 1:  # as in diffusers: no text guidance, no guidance at all
            return range(0)
        first, end = (
            math.ceil(round(self.steps * share, 6))  # 50 * 0.14 is above 7
            for share in (self.guidance_from, self.guidance_until)
        )
        return range(first, end) or range(0)  # one empty range is as another

    @property
    def unet_evaluations(self) -> int:
        """The UNet evaluations that an edit costs, each branch counted."""
        return self.steps + 2 * len(self.guided_steps)

    @model_validator(mode="after")
    def _guidance_ends_after_it_begins(self) -> Self:
        if self.guidance_from >= self.guidance_until:
            raise ValueError("guidance_from must be below guidance_until")
        return self

    @field_validator("prompts")
    @classmethod
    def _prompts_differ(cls, prompts: list[str]) -> list[str]:
        twice = sorted(prompt for prompt, times in Counter(prompts).items() if times > 1)
        if twice:
            raise ValueError(f"named twice: {', '.join(twice)}")
        for prompt in prompts:
            if any(unicodedata.category(character) == "Cc" for character in prompt):
                raise ValueError(f"a line break or another control character is in {prompt!r}")
        return prompts

    @field_validator("template")
    @classmethod
    def _template_has_prompt(cls, template: str) -> str:
        if template.count("{prompt}") != 1 or set("{}") & set(template.replace("{prompt}", "")):
            raise ValueError("needs {prompt} exactly once, and no other braces")
        return template


class Mixing(Section):
    """How original, edit and fractal are joined: A = (1 - lam) (M I + (1 - M) G) + lam F."""

    masks: list[Mask] = Field(
        ["left", "right", "top", "bottom"],
        min_length=1,
        description="The half that stays the original; one is drawn an image.",
    )
    seam: int = Field(
        0, ge=0, multiple_of=2, description="Width in px of the linear seam between the halves."
    )
    lam: float = Field(0.2, ge=0, le=1, description="Weight of the fractal, lambda.")
    fractal_dir: str = Field("", description="A folder of fractal images; empty: made from a seed.")
    fractal_count: int = Field(64, gt=0, description="How many fractals are made.")


class Training(Section):
    """The classifier and its recipe, the same for every arm."""

    arms: list[Arm] = Field(
        ["vanilla", "diffusemix"],
        min_length=1,
        description="What is trained: originals alone, with a rival augmentation, or with one of "
        "the three stages; diffusemix_online draws masks and fractals anew for every batch. One of "
        f"{', '.join(ARMS)}, or a Python file that defines an augmentation (docs/extending.md).",
    )
    model: str = Field(
        "resnet10t",
        min_length=1,
        description="A timm model's name, or preact_resnet18, which is for images of 32 to 64 px.",
    )
    pretrained: bool = Field(False, description="Start from timm's pretrained weights.")
    revision: Commit | None = Field(
        None,
        validate_default=True,
        description="The commit of these weights on the hub, 40 hex digits.",
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0], min_length=1, description="One classifier an arm and seed."
    )
    few_images: list[Annotated[int, Field(gt=0)]] = Field(
        [],
        description="Train vanilla and DiffuseMix with so many training images a class as well, "
        "for a curve of accuracy against their number.",
    )
    steps: int = Field(900, gt=0, description="Optimiser steps, the same for every arm.")
    batch_size: int = Field(48, gt=0, description="Images a step.")
    processes: int = Field(
        1, gt=0, description="Processes that share each step's batch, a GPU of this machine each."
    )
    accumulate: int = Field(
        1,
        gt=0,
        description="Parts of a process's share that are computed one after the other, where it "
        "does not fit into memory at once.",
    )
    optimizer: Optimizer | None = Field(
        None, description="adamw, or sgd with Nesterov's momentum; empty: what suits the model."
    )
    learning_rate: float | None = Field(
        None, gt=0, description="Peak rate; empty: what suits model, optimizer and batch_size."
    )
    weight_decay: float | None = Field(None, ge=0, description="Empty: what suits the model.")
    label_smoothing: float = Field(
        0, ge=0, lt=1, description="Share of each label that goes to all classes."
    )
    crop_padding: int = Field(4, ge=0, description="Random crop after reflecting so many px.")
    flip: bool = Field(True, description="Mirror half of the training images.")
    validations: int = Field(10, gt=0, description="How often val is read; the best weights stay.")

    @property
    def pretrained_at(self) -> str | None:
        """The commit whose weights a classifier starts from; None: it starts from nothing."""
        return self.revision if self.pretrained else None

    @field_validator("revision")
    @classmethod
    def _pretrained_weights_are_pinned(
        cls, revision: str | None, info: ValidationInfo
    ) -> str | None:
        if info.data.get("pretrained") and revision is None:
            raise ValueError(
                "training.pretrained=true needs it, as weights are loaded by their commit alone: "
                "name the commit, 40 hex digits, from the page of timm/MODEL on the hub, under "
                "Files, History"
            )
        return revision

    @field_validator("arms", "seeds")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        names = [Path(value).stem if is_own(str(value)) else str(value) for value in values]
        alike = Counter(re.sub(r"[\W_]", "", name.lower()) for name in names)
        twice = sorted({name for name in names if alike[re.sub(r"[\W_]", "", name.lower())] > 1})
        if twice:
            raise ValueError(f"named twice: {', '.join(twice)}")
        return values

    @model_validator(mode="after")
    def _parts_of_a_batch_are_equal(self) -> Self:
        if self.batch_size % (self.processes * self.accumulate):
            raise ValueError("batch_size must be a multiple of processes times accumulate")
        return self


class Evaluation(Section):
    """What the trained classifiers are judged by, on the test images."""

    fgsm_epsilons: list[Annotated[float, Field(gt=0, le=255)]] = Field(
        [1, 2, 4, 8], min_length=1, description="FGSM strengths, in units of 1/255."
    )
    attack_epsilon: float = Field(
        8, gt=0, le=255, description="Strength of PGD and AutoAttack, in units of 1/255."
    )
    attack_images: int = Field(
        256, ge=0, description="Test images that PGD-20 is tried on, drawn from the seed; 0: none."
    )
    autoattack_images: int = Field(
        32, ge=0, description="The first of these that AutoAttack is tried on as well; 0: none."
    )
    corruptions: list[Corruption] = Field(
        ["gaussian_noise", "defocus_blur", "motion_blur", "brightness", "contrast", "pixelate"],
        min_length=1,
        description="Corruption families.",
    )
    severities: list[Annotated[int, Field(ge=1, le=5)]] = Field(
        [1, 3, 5], min_length=1, description="Corruption severities, 1 to 5."
    )
    corrupted_sets: str = Field(
        "",
        description="A folder of published corrupted test images as ImageNet-C or CIFAR-10-C has "
        "them, on which all arms are judged as well; empty: none.",
    )
    bootstrap_samples: int = Field(2000, ge=1000, description="Resamples for each 95 % interval.")
    batch_size: int = Field(256, gt=0, description="Images a forward pass.")

    @model_validator(mode="after")
    def _autoattacked_are_attacked(self) -> Self:
        if self.autoattack_images > self.attack_images:
            raise ValueError("autoattack_images must not exceed attack_images")
        return self


class Tracking(Section):
    """Where MLflow keeps runs and models."""

    uri: str = Field("", description="An MLflow server; empty: a database under .diffusemix/.")
    address: str = Field(
        "", description="Where a browser finds that server, if not at `uri`; for links."
    )
    experiment: str = Field("diffusemix", min_length=1, description="The MLflow experiment.")
    model_name: str = Field(
        "diffusemix-classifier", min_length=1, description="The registered model's name."
    )

    @field_validator("uri", "address")
    @classmethod
    def _holds_no_secret(cls, url: str) -> str:
        if without_secrets(url) != url:  # it may be a token; links and logs show the rest
            raise ValueError(
                "holds a name or password: give them by the environment, as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        return url


class Checks(Section):
    """What a run must reach to go on, and a new model to take the champion's place."""

    gate_yield: float = Field(
        0.2,
        ge=0,
        le=1,
        description="The least share of edits that the label gate lets through, before mixing.",
    )
    val_accuracy: float | None = Field(
        None,
        ge=0,
        le=1,
        description="The least val accuracy of the best model, before promotion; empty: more than "
        "naming the most frequent class gives but once in a thousand.",
    )
    promotion_tolerance: float = Field(
        0.01,
        ge=0,
        le=1,
        description="How far clean or corrupted val accuracy may fall below the champion's, while "
        "their mean does not.",
    )


class Settings(Section):
    """All settings."""

    seed: int = Field(0, ge=0, description="What every random draw follows from.")
    size: int = Field(
        64,
        ge=16,
        le=2048,
        multiple_of=8,
        description="Side in px of edits, augmented images and the classifier's input.",
    )
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:N, mps.")
    executor: Executor = Field(
        "in_process",
        description="How a run's steps run: in one process, in one each, or as jobs of the Ray "
        "cluster at RAY_ADDRESS; for runs from the UI or a schedule read on loading.",
    )
    owners: list[Owner] = Field(
        [],
        description="Who answers for the assets in the UI: addresses, or team:NAME; read on "
        "loading.",
    )
    retrain_cron: str = Field(
        "0 4 * * 1",
        description="When the schedule `retrain` runs, in UTC, as cron writes it; read on loading.",
    )
    keep_runs_days: int = Field(
        90, ge=1, description="How long the job `maintenance` keeps runs; read on loading."
    )
    thumbnails: bool = Field(
        False,
        description="Show some of the images in the report, in MLflow and on the assets' pages; "
        "without, plots and numbers alone leave data/.",
    )
    source: Source = Source()
    storage: Storage = Storage()
    editing: Editing = Editing()
    mixing: Mixing = Mixing()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    checks: Checks = Checks()


PLACE_OR_SPEED = ("editor", "revision", "lora", "batch_size", "shards", "dtype", "compile")
"""Settings below `editing` that say where an editor is and how fast.

What they shape is known otherwise: weights by their digest, the rest by the numeric profile.
"""


_OF_RUNNING = {
    "tracking", "executor", "storage", "owners", "retrain_cron", "keep_runs_days", "checks",
}  # fmt: skip
"""What shapes no image and no classifier."""


def own_files(settings: Settings) -> list[str]:
    """Return the Python files of the user's own that shape what is made of images."""
    return [name for name in (settings.editing.editor, *settings.training.arms) if is_own(name)]


def flatten(settings: Settings) -> dict[str, Any]:
    """Return every setting that shapes a result by its dotted key; not those of what follows it."""
    values = settings.model_dump(mode="json", exclude=_OF_RUNNING)
    return {key: value_at(values, key) for key, _ in leaves(Settings) if holds(values, key)}


def data_settings(settings: Settings) -> str:
    """Return, as YAML, the settings that shape the made stages of `data/`; places do not.

    What was asked of the source is in the notes of `data/raw`, the editor's identity in those of
    `data/generated`: both may come from elsewhere than these settings say.
    """
    elsewhere = {"device", "thumbnails", "source", "training", "evaluation"} | _OF_RUNNING
    values = settings.model_dump(exclude=elsewhere)
    for name in PLACE_OR_SPEED:
        del values["editing"][name]
    del values["mixing"]["fractal_dir"]
    return yaml.safe_dump(values, sort_keys=True)


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Give the dotted key and the documentation of every setting below a section."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""


def value_at(values: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key of nested values; None where there is none."""
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def holds(values: Mapping[str, Any], key: str) -> bool:
    """Tell whether nested values hold a dotted key."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        values = inner if isinstance(inner, Mapping) else {}
    return last in values
