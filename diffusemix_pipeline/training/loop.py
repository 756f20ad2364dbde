"""The training loop: a cosine with warm-up, random crop and flip, best weights on val.

Everything random in a step follows from the seed and the step's number, so that batches may be made
ahead by other processes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

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

_WARM_UP = 0.05  # share of the steps
_MOMENTUM = 0.9
_MOST_READERS = 8


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
) -> pd.DataFrame:
    """Train `classifier` in place for `training.steps` steps and keep its best weights on val.

    Returns the curve: a row a validation, with step, train_loss, val_loss, val_accuracy and
    learning_rate. Val decides, test is never seen (DESIGN, promise 7). Everything random follows
    from `seed`.
    """
    model = classifier.model.to(device).to(memory_format=torch.channels_last)
    recipe = recipe_of(training)
    optimizer = _optimizer(model, recipe)
    kind = torch.device(device).type
    half = is_fast_at_bfloat16(device)
    every = max(1, training.steps // training.validations)
    points, losses = [], []
    best_accuracy, best_weights = -1.0, model.state_dict()

    batches = _Batches(train, training, augmentation, seed)
    for step, (pixels, labels) in enumerate(_read_ahead(batches, on_gpu=kind == "cuda"), 1):
        rate = recipe.learning_rate * _schedule(step / training.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, targets = to_tensor(pixels, device), labels.to(device, non_blocking=True)
        model.train()
        with _seeded(seed, step, device):
            if augmentation.batch:
                images, targets = augmentation.batch(images, targets)
            with torch.autocast(kind, torch.bfloat16, enabled=half):
                loss = functional.cross_entropy(
                    model(images), targets, label_smoothing=training.label_smoothing
                )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # to read it would wait for the device

        if step % every == 0 or step == training.steps:
            val_loss, val_accuracy = _validate(classifier, val)
            point = {
                "train_loss": float(torch.stack(losses).mean()),
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "learning_rate": rate,
            }
            losses.clear()
            points.append({"step": step, **point})
            on_point(step, point)
            if val_accuracy > best_accuracy:
                best_accuracy = val_accuracy
                best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        progress(describe, step, training.steps)

    model.load_state_dict(best_weights)
    model.eval()
    return pd.DataFrame(points)


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
    """The batch of each step, from 0: uint8 (B, S, S, 3) images and int64 (B,) labels."""

    def __init__(
        self, train: LabelledImages, training: Training, augmentation: Augmentation, seed: int
    ) -> None:
        self._train, self._training = train, training
        self._augmentation, self._seed = augmentation, seed

    def __len__(self) -> int:
        return self._training.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        train, augmentation = self._train, self._augmentation
        rng = np.random.default_rng([self._seed, step])
        places = places_of_step(step, self._training.batch_size, len(train), self._seed)
        images = train.images[places]
        if augmentation.redraw:
            images = augmentation.redraw(places, images, rng)
        images = _crop_and_flip(images, self._training, rng)
        if augmentation.each:
            with _seeded(self._seed, step, "cpu"):
                images = np.stack([augmentation.each(image, rng) for image in images])
        return torch.from_numpy(images), torch.from_numpy(train.labels[places])


def _read_ahead(batches: _Batches, on_gpu: bool) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """Give each step's batch; beside a GPU, other processes make them while it computes.

    Without one, they would take the cores that compute.
    """
    readers = min(_MOST_READERS, usable_cores()) if on_gpu else 0
    return DataLoader(
        batches,
        batch_size=None,
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
