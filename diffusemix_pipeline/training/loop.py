"""The training loop: a cosine with warm-up, random crop and flip, best weights on val.

Everything random in a step follows from the seed and the step's number, so that batches may be made
ahead by other processes, and a training that was cut off goes on as if it had not been.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from diffusemix_pipeline.devices import is_fast_at_bfloat16, usable_cores
from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.recipes import Recipe, recipe_of
from diffusemix_pipeline.settings import Training
from diffusemix_pipeline.training.augmentations import NONE, Augmentation
from diffusemix_pipeline.training.classifier import Classifier, to_tensor
from diffusemix_pipeline.training.data import LabelledImages
from diffusemix_pipeline.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

_KEEP_EVERY_SECONDS = 120.0
_WARM_UP = 0.05  # share of the steps
_MOMENTUM = 0.9
_MOST_READERS = 8


class Checkpoint(NamedTuple):
    """The file of what a training has learnt so far, and a folder on its file system."""

    path: Path
    aside: Path
    """Holds what is half-written."""


def fit(
    classifier: Classifier,
    train: LabelledImages,
    val: LabelledImages,
    training: Training,
    *,
    seed: int,
    device: str,
    describe: str = "Training",
    augmentation: Augmentation = NONE,
    on_point: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    progress: Progress = silent,
    checkpoint: Checkpoint | None = None,
    group: "Accelerator | None" = None,
) -> pd.DataFrame:
    """Train `classifier` in place for `training.steps` steps and keep its best weights on val.

    Returns the curve: a row a validation, with step, train_loss, val_loss, val_accuracy and
    learning_rate. Val decides, test is never seen: it is read once a model, when nothing is left
    to be chosen. Everything random follows from `seed`. What was learnt goes to `checkpoint` at
    each validation and every two minutes: another call goes on from there. Of the processes of a
    `group`, each takes its share of every batch; the first alone validates, keeps the best weights
    and returns a curve.
    """
    model = classifier.model.to(device).to(memory_format=torch.channels_last)
    recipe = recipe_of(training)
    optimizer = _optimizer(model, recipe)
    every = max(1, training.steps // training.validations)
    rank, of = (group.process_index, group.num_processes) if group else (0, 1)
    shared = group.prepare_model(model) if group else model

    state = TrainingState.begin(model, optimizer)
    if checkpoint and checkpoint.path.exists():
        state.read(checkpoint.path)
        for point in state.points:
            on_point(int(point["step"]), {k: v for k, v in point.items() if k != "step"})
    written = time.monotonic()
    batches = _Batches(train, training, augmentation, seed, rank, of)
    ahead = _read_ahead(batches, range(state.step, training.steps), device)
    for step, (pixels, labels) in enumerate(ahead, state.step + 1):
        rate = recipe.learning_rate * _schedule(step / training.steps)
        for param_group in optimizer.param_groups:
            param_group["lr"] = rate
        model.train()
        with _seeded(batches.seed_of_share, step, device):
            losses = _backward(
                shared, optimizer, pixels, labels, training, augmentation, device, group
            )
        optimizer.step()
        state.step = step

        if rank == 0:
            state.losses += losses
        validates = rank == 0 and (step % every == 0 or step == training.steps)
        if validates:
            point = _point(classifier, val, state.losses, rate)
            state.losses.clear()
            state.points.append({"step": step, **point})
            state.keep_if_best(point["val_accuracy"])
        overdue = rank == 0 and time.monotonic() - written > _KEEP_EVERY_SECONDS
        if checkpoint and (validates or overdue):
            state.write(checkpoint.path, aside=checkpoint.aside)
            written = time.monotonic()
        if validates:
            on_point(step, point)
        progress(describe, step, training.steps)

    model.load_state_dict(state.best_weights)
    model.eval()
    return pd.DataFrame(state.points)


def _backward(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    training: Training,
    augmentation: Augmentation,
    device: str,
    group: "Accelerator | None",
) -> list[torch.Tensor]:
    """Give the weights the gradients of a batch, uint8 (B, S, S, 3) and int64 (B,), by its parts.

    Returns the loss of each part, on the device: to read them would wait for it.
    """
    half = is_fast_at_bfloat16(device)
    parts = list(
        zip(pixels.chunk(training.accumulate), labels.chunk(training.accumulate), strict=True)
    )
    losses = []
    for number, (part, its_labels) in enumerate(parts, 1):
        images = to_tensor(part, device)
        targets = its_labels.to(device, non_blocking=True)
        if augmentation.batch:
            images, targets = augmentation.batch(images, targets)
        last = number == len(parts)  # gradients are summed over the processes once a step
        with group.no_sync(model) if group and not last else nullcontext():
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
                loss = functional.cross_entropy(
                    model(images), targets, label_smoothing=training.label_smoothing
                )
            if number == 1:
                # Freed before the forward pass, the gradients' memory would go to its tensors and
                # be paged in anew for the next ones.
                optimizer.zero_grad(set_to_none=True)
            (loss / len(parts)).backward()
        losses.append(loss.detach())
    return losses


def _point(
    classifier: Classifier, val: LabelledImages, losses: list[torch.Tensor], rate: float
) -> dict[str, float]:
    """Return a point of the curve, `losses` being those since the last one."""
    val_loss, val_accuracy = _validate(classifier, val)
    return {
        "train_loss": float(torch.stack(losses).mean()),
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "learning_rate": rate,
    }


def _optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    how: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=_MOMENTUM, nesterov=True, **how)
    return torch.optim.AdamW(model.parameters(), **how)


def _schedule(done: float) -> float:
    """Return the learning rate's share of its peak: linear warm-up, then a cosine to zero."""
    if done < _WARM_UP:
        return done / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


class _Batches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A share of the batch of each step, from 0: uint8 (B, S, S, 3) images and int64 (B,) labels.

    The share is every `of`-th image, from the one with number `rank`. `seed` says which images a
    step sees, `seed_of_share` what happens to those of this share.
    """

    def __init__(
        self,
        train: LabelledImages,
        training: Training,
        augmentation: Augmentation,
        seed: int,
        rank: int = 0,
        of: int = 1,
    ) -> None:
        self._train, self._training, self._augmentation = train, training, augmentation
        self._seed = seed
        self.seed_of_share = seed_from(seed, "share", rank) if rank else seed
        self._share = slice(rank, None, of)

    def __len__(self) -> int:
        return self._training.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        train, augmentation = self._train, self._augmentation
        rng = np.random.default_rng([self.seed_of_share, step])
        batch = places_of_step(step, self._training.batch_size, len(train), self._seed)
        places = batch[self._share]
        images = train.images[places]
        if augmentation.redraw:
            images = augmentation.redraw(places, images, rng)
        images = _crop_and_flip(images, self._training, rng)
        if augmentation.each:
            with _seeded(self.seed_of_share, step, "cpu"):
                images = np.stack([augmentation.each(image, rng) for image in images])
        return torch.from_numpy(images), torch.from_numpy(train.labels[places])


def _read_ahead(
    batches: _Batches, steps: range, device: str
) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """Give the batches of `steps`; beside a GPU, other processes make them while it computes.

    Without one, they would take the cores that compute.
    """
    on_gpu = torch.device(device).type == "cuda"
    readers = min(_MOST_READERS, usable_cores()) if on_gpu else 0
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=readers,
        pin_memory=on_gpu,
        # Forks share the file of the decoded images, and touch no device.
        multiprocessing_context="fork" if readers else None,
    )


@contextmanager
def _seeded(seed: int, step: int, device: str) -> Iterator[None]:
    """Draw from torch's global generators as a step determines, and leave them as they were."""
    cuda = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed_from(seed, step))
        yield


def places_of_step(step: int, batch_size: int, total: int, seed: int) -> np.ndarray:
    """Return the places int64 (batch_size,) of a step's images among `total`.

    Every image is seen once an epoch, each epoch in an order of its own; `step` counts from 0.
    """
    drawn = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = drawn // total, drawn % total
    return np.concatenate(
        [_order(int(epoch), total, seed)[places[epochs == epoch]] for epoch in np.unique(epochs)]
    )


@lru_cache(maxsize=2)
def _order(epoch: int, total: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 1, epoch]).permutation(total)


def _crop_and_flip(images: np.ndarray, training: Training, rng: np.random.Generator) -> np.ndarray:
    """Shift uint8 (B, S, S, 3) images by up to `crop_padding` px, reflecting, and mirror half."""
    padding, size = training.crop_padding, images.shape[1]
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), "reflect")
    offsets = rng.integers(0, 2 * padding + 1, size=(len(images), 2))
    mirrored = rng.random(len(images)) < 0.5
    cropped = np.empty_like(images)
    for index, (top, left) in enumerate(offsets):
        crop = padded[index, top : top + size, left : left + size]
        cropped[index] = crop[:, ::-1] if training.flip and mirrored[index] else crop
    return cropped


def _validate(classifier: Classifier, val: LabelledImages) -> tuple[float, float]:
    """Return mean cross-entropy (nats) and top-1 accuracy on val."""
    probabilities = classifier.predict_proba(val.images)
    correct = probabilities[np.arange(len(val)), val.labels]
    accuracy = float((probabilities.argmax(1) == val.labels).mean())
    return float(-np.log(np.maximum(correct, 1e-12)).mean()), accuracy
