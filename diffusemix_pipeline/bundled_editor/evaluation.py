"""What an editor is worth: five figures a set of test images and size, and a contact sheet.

What belongs here: measuring an editor folder through the editor of the product, with the default
settings. What does not: training, and anything that only the bundled editor has: any
InstructPix2Pix checkpoint may be judged, though only this one was made to imitate the teachers.

The figures, each on test images that no one trained on:

- autoencoder: PSNR, and the share of each chroma channel's variance that survives, of originals;
- named: how often a classifier that was trained on teacher edits names the edit's prompt;
- psnr: PSNR between an edit and the nearest of 16 draws of its teacher, mean over edits;
- variety: mean absolute difference between the edits of one image from two seeds, in 1/255;
- subject: accuracy of a classifier trained on originals only, on originals and on their edits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from diffusemix_pipeline.bundled_editor.sources import (
    Images,
    make_pictures,
    read_digits,
    read_image_folder,
)
from diffusemix_pipeline.bundled_editor.teachers import PROMPTS, apply_teacher, apply_teachers
from diffusemix_pipeline.devices import is_fast_at_bfloat16
from diffusemix_pipeline.editing.editor import Editor, load_editor
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import write_bytes
from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.pictures import contact_sheet
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Editing
from diffusemix_pipeline.training.classifier import to_tensor
from diffusemix_pipeline.training.fold_teachers import tone

_DRAWS = 16
_SIZES = (32, 64)  # px
_IMAGES = 20  # of a set that are edited
_JUDGE_STEPS = 1500
_SEED = 0
_EDIT_SEEDS = (0, 1)


def evaluate_editor(
    location: Path,
    *,
    image_folders: Mapping[str, Path],
    train_folders: Mapping[str, Path],
    sheet: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure the editor at `location` and write its contact sheet; return all figures.

    `image_folders` maps a set's name to its folder of class folders of test images,
    `train_folders` the same names to originals of the same classes, on which the judges are
    trained. scikit-learn's digits are always one more set. The result is plain JSON:
    `figures[set][size]` holds the five figures, in dB, 1/255 and shares of 1.

    Raises UserError for a folder without images and for a test class that no train folder has.
    """
    editing = Editing(batch_size=_IMAGES)
    editor = load_editor(location, editing, "cpu")
    autoencoder = AutoencoderKL.from_pretrained(location / "vae", use_safetensors=True)
    taught = {name: _read_set(name, train_folders, 32, "train") for name in _names(train_folders)}
    judged = {name: _read_set(name, image_folders, 32, "test") for name in _names(image_folders)}
    for name in judged:
        _numbers(name, judged[name][1], taught[name][1])  # refused before anything is trained
    photographs = [to_tensor(images) for images, _ in taught.values()]
    prompt_judge = train_prompt_judge(photographs, _JUDGE_STEPS, _SEED, progress)
    figures: dict[str, dict[str, Any]] = {}
    sheet_parts: list[tuple[str, Tensor]] = []
    for name in judged:
        originals, classes = taught[name]
        labels = _numbers(name, classes, classes)
        subject_judge = train_subject_judge(
            to_tensor(originals), labels, _JUDGE_STEPS, _SEED, progress
        )
        figures[name] = {}
        for size in _SIZES:
            pixels, names = _read_set(name, image_folders, size, "test")
            shown = _spread(len(pixels), _IMAGES)
            images, labels = pixels[shown], _numbers(name, [names[row] for row in shown], classes)
            edits = _edit_all(editor, editing, images, progress)
            figures[name][str(size)], pictures = _figures_of_set(
                autoencoder, to_tensor(images), labels, edits, prompt_judge, subject_judge
            )
            sheet_parts.append((f"{name} {size} px", pictures))
    _write_sheet(sheet, sheet_parts)
    return {
        **editing.model_dump(include={"sampler", "steps", "guidance", "image_guidance"}),
        "figures": figures,
    }


def _figures_of_set(
    autoencoder: AutoencoderKL,
    images: Tensor,
    labels: Tensor,
    edits: Tensor,
    prompt_judge: nn.Module,
    subject_judge: nn.Module,
) -> tuple[dict[str, Any], Tensor]:
    """All figures of a set at one size, and three of its images with their edits for the sheet.

    See `measure_edits` and `_write_sheet` for the shapes.
    """
    figures = {
        "images": len(images),
        "autoencoder": measure_autoencoder(autoencoder, images),
        **measure_edits(images, labels, edits, prompt_judge, subject_judge, _SEED),
    }
    few = torch.linspace(0, len(images) - 1, 3).long()
    return figures, torch.cat([images[few][None], edits[:, :, few].flatten(0, 1)])


# Editing


def _edit_all(
    editor: Editor, editing: Editing, images: Images, progress: Progress = silent
) -> Tensor:
    """Edit every image under every prompt, from two seeds.

    images: uint8 [N, S, S, 3]. Returns float32 [prompts, 2, N, 3, S, S] in [0, 1].
    """
    batches = []
    for prompt in PROMPTS:
        instructions = [editing.template.format(prompt=prompt)] * len(images)
        for seed in _EDIT_SEEDS:
            drawn = [seed_from(seed, prompt, row) for row in range(len(images))]
            batches.append(to_tensor(editor.edit(images, instructions, drawn)))
            progress("editing test images", len(batches), len(PROMPTS) * len(_EDIT_SEEDS))
    return torch.stack(batches).unflatten(0, (len(PROMPTS), len(_EDIT_SEEDS)))


# Figures


@torch.no_grad()
def measure_autoencoder(autoencoder: AutoencoderKL, images: Tensor) -> dict[str, float | None]:
    """PSNR in dB, and the share of each colour difference's variance that the decoded images keep.

    The shares (blue - luminance, red - luminance) are None for grey images, which have none.
    """
    latents = autoencoder.encode(images * 2 - 1).latent_dist.mode()
    decoded = (autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    before, after = _chroma(images).var((0, 2, 3)), _chroma(decoded).var((0, 2, 3))
    kept: list[float | None] = [None, None]
    if before.min() > 1e-4:
        kept = (after / before).tolist()
    return {"psnr": _psnr(decoded, images).mean().item(), "blue_kept": kept[0], "red_kept": kept[1]}


def measure_edits(
    images: Tensor,
    labels: Tensor,
    edits: Tensor,
    prompt_judge: nn.Module,
    subject_judge: nn.Module,
    seed: int,
) -> dict[str, Any]:
    """The figures of edits [prompts, seeds >= 2, N, 3, S, S] of images [N, 3, S, S]."""
    by_prompt = {}
    for number, prompt in enumerate(PROMPTS):
        its_edits = edits[number].flatten(0, 1)
        by_prompt[prompt] = {
            "named": (_predict(prompt_judge, its_edits) == number).float().mean().item(),
            "psnr": psnr_to_teacher(images, edits[number], prompt, seed).mean().item(),
            "variety": 255 * (edits[number, 0] - edits[number, 1]).abs().mean().item(),
            "subject": _accuracy(subject_judge, its_edits, labels.repeat(edits.shape[1])),
        }
    overall = {
        key: sum(figures[key] for figures in by_prompt.values()) / len(PROMPTS)
        for key in ("named", "psnr", "variety", "subject")
    }
    subject_before = _accuracy(subject_judge, images, labels)
    return {
        **overall,
        "subject_before": subject_before,
        "subject_lost": subject_before - overall["subject"],
        "by_prompt": by_prompt,
    }


def psnr_to_teacher(images: Tensor, edits: Tensor, prompt: str, seed: int) -> Tensor:
    """PSNR in dB [seeds, N] of a prompt's edits [seeds, N, 3, S, S] to the nearest teacher draw."""
    draws = _draw_teacher(images, prompt, _DRAWS, seed)
    each = [_psnr(edits.flatten(0, 1), draw.repeat(len(edits), 1, 1, 1)) for draw in draws]
    return torch.stack(each).amax(0).unflatten(0, edits.shape[:2])


def _draw_teacher(images: Tensor, prompt: str, draws: int, seed: int) -> Tensor:
    """`draws` independent teacher edits of the images: [draws, N, 3, S, S]."""
    generator = torch.Generator().manual_seed(seed_from(seed, "draws", prompt))
    return torch.stack([apply_teacher(images, prompt, generator) for _ in range(draws)])


def _psnr(first: Tensor, second: Tensor) -> Tensor:
    """PSNR in dB of each image of a batch in [0, 1]."""
    return -10 * torch.log10((first - second).square().mean((1, 2, 3)) + 1e-10)


def _chroma(images: Tensor) -> Tensor:
    """The colour differences blue - luminance and red - luminance, [N, 2, H, W]."""
    red, green, blue = images.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([blue - luma, red - luma], 1)


# Judges


class _Judge(nn.Sequential):
    """A small convolutional classifier of images [N, 3, S, S] in [0, 1] of any size."""

    def __init__(self, classes: int) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (192, 2)):
            layers += [
                nn.Conv2d(channels, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, classes))


def train_prompt_judge(
    photographs: Sequence[Tensor], steps: int, seed: int, progress: Progress = silent
) -> nn.Module:
    """Train a classifier to name the prompt of teacher edits, at 32 and at 64 px by turns.

    photographs: sets of originals [N, 3, 32, 32] in [0, 1], each drawn from as often.
    """
    made = to_tensor(make_pictures(600, 32, np.random.default_rng(seed)))
    pools = [*photographs, made]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed_from(seed, "prompt judge", step))
        pool = pools[step % len(pools)]
        images = pool[torch.randint(len(pool), (72,), generator=generator)]
        if step // len(pools) % 3 == 0:
            images = _resize(images[:24], 64)
        prompts = torch.randint(len(PROMPTS), (len(images),), generator=generator)
        return apply_teachers(images, [PROMPTS[one] for one in prompts], generator), prompts

    return _train_judge(len(PROMPTS), batch, steps, seed, "the prompt judge", progress)


def train_subject_judge(
    images: Tensor, labels: Tensor, steps: int, seed: int, progress: Progress = silent
) -> nn.Module:
    """Train a classifier on originals at 32 px, under the usual augmentations.

    images: [N, 3, 32, 32] in [0, 1]. It never sees an edit.
    """

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed_from(seed, "subject judge", step))
        rows = torch.randint(len(images), (96,), generator=generator)
        return _augment(images[rows], generator), labels[rows]

    return _train_judge(int(labels.max()) + 1, batch, steps, seed, "the subject judge", progress)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """The usual: move, change contrast, colour cast and brightness, add noise, erase a square."""

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        drawn = torch.rand(len(images), channels, 1, 1, generator=generator)
        return low + (high - low) * drawn

    side = images.shape[-1]
    down, right = torch.randint(0, 7, (2,), generator=generator).tolist()
    moved = functional.pad(images, (3, 3, 3, 3), mode="reflect")
    moved = moved[..., down : down + side, right : right + side]
    toned = tone(moved, uniform)
    noise = torch.randn(images.shape, generator=generator)
    noisy = toned + uniform(-0.08, 0.08).clamp(min=0) * noise
    place = torch.arange(side) / side
    away_y = (place.view(1, 1, -1, 1) - uniform(0, 1)).abs()
    away_x = (place.view(1, 1, 1, -1) - uniform(0, 1)).abs()
    erased = torch.maximum(away_y, away_x) < uniform(-0.15, 0.15)
    return torch.where(erased, uniform(0, 1, 3), noisy).clamp(0, 1)


def _train_judge(
    classes: int,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    seed: int,
    name: str,
    progress: Progress,
) -> nn.Module:
    torch.manual_seed(seed_from(seed, name))
    judge = _Judge(classes).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in range(steps):
        images, labels = batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_fast_at_bfloat16("cpu")):
            scores = judge(images.contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(scores.float(), labels, label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress(f"training {name}, loss {loss.item():.3f}", step + 1, steps)
    return judge.eval()


@torch.no_grad()
def _predict(judge: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([judge(chunk).argmax(1) for chunk in images.split(256)])


def _accuracy(judge: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy of a judge that was trained at 32 px: larger images are averaged down to it."""
    return (_predict(judge, _resize(images, 32)) == labels).float().mean().item()


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return functional.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)


# Sets


def _names(folders: Mapping[str, Path]) -> list[str]:
    return [*folders, "digits"]


def _read_set(
    name: str, folders: Mapping[str, Path], size: int, split: str
) -> tuple[Images, list[str]]:
    """Images [N, size, size, 3] and N class names of a named folder, or of the digits."""
    if name in folders:
        return read_image_folder(folders[name], size)
    return read_digits(size, split)


def _numbers(name: str, labels: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Number class names by their place among those that the judge of this set learns."""
    number = {label: place for place, label in enumerate(sorted(set(classes)))}
    unknown = sorted(set(labels) - set(number))
    if unknown:
        raise UserError(
            f"{name}: the test folder has classes that the train folder lacks: "
            f"{', '.join(unknown)}."
        )
    return torch.tensor([number[label] for label in labels])


def _spread(images: int, count: int) -> list[int]:
    """`count` rows spread evenly over a set of images, and so over its sorted classes."""
    rows = torch.linspace(0, images - 1, min(count, images)).round().long()
    return list(rows.tolist())


# Pictures


def _write_sheet(path: Path, parts: Sequence[tuple[str, Tensor]]) -> None:
    """Write a contact sheet: a column an image, rows of originals and of two edits a prompt.

    parts: titles, each with images [1 + 2 * prompts, N, 3, S, S] in [0, 1], originals first.
    """
    names = ["original", *(f"{prompt}, seed {seed}" for prompt in PROMPTS for seed in _EDIT_SEEDS)]
    rows = [
        [
            (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            for _, images in parts
            for image in images[row]
        ]
        for row in range(len(names))
    ]
    titles = [title for title, images in parts for _ in range(images.shape[1])]
    write_bytes(path, contact_sheet(rows, row_labels=names, column_labels=titles, cell=64))
