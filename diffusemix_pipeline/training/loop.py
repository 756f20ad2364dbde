"""The training loop: AdamW, a cosine with warm-up, random crop and flip, best weights on val."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Training
from diffusemix_pipeline.training.classifier import Classifier, to_tensor
from diffusemix_pipeline.training.data import LabelledImages

_WARM_UP = 0.05  # share of the steps


def fit(
    classifier: Classifier,
    train: LabelledImages,
    val: LabelledImages,
    training: Training,
    *,
    seed: int,
    device: str,
    describe: str = "Training",
    augment: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
    on_point: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Train `classifier` in place for `training.steps` steps and keep its best weights on val.

    Returns the curve: a row a validation, with step, train_loss, val_loss, val_accuracy and
    learning_rate. Val decides, test is never seen (DESIGN, promise 7). Everything random follows
    from `seed`. `augment` changes float (B, 3, S, S) images in [0, 1] after crop and flip.
    """
    model = classifier.model.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    mixed = torch.device(device).type == "cuda"  # elsewhere autocast is slower or not exact
    batches = _batches(len(train), training.batch_size, seed)
    rng = np.random.default_rng(seed)
    every = max(1, training.steps // training.validations)
    points, losses = [], []
    best_accuracy, best_weights = -1.0, model.state_dict()

    for step in range(1, training.steps + 1):
        rate = training.learning_rate * _schedule(step / training.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = next(batches)
        images = _crop_and_flip(train.images[index], training, rng)
        labels = torch.from_numpy(train.labels[index]).to(device)
        model.train()
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            loss = functional.cross_entropy(model(augment(to_tensor(images, device))), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

        if step % every == 0 or step == training.steps:
            val_loss, val_accuracy = _validate(classifier, val)
            point = {
                "train_loss": float(np.mean(losses)),
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


def _schedule(done: float) -> float:
    """Return the learning rate's share of its peak: linear warm-up, then a cosine to zero."""
    if done < _WARM_UP:
        return done / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def _batches(total: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield index arrays for ever: every image once an epoch, each epoch in an order of its own."""
    rng = np.random.default_rng([seed, 1])
    waiting = np.empty(0, np.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, rng.permutation(total)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


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
