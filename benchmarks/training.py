"""How near training comes to the speed of its model alone.

    python -m benchmarks.training [--json]

Prints the ratio of the training loop's speed (images read from the decoded file, cropped, flipped,
scheduled, logged) to that of the same model and optimiser on batches that are already tensors in
memory: 1 would be a loop that costs nothing. Both run in turns within one process. Beside it, what
making the batches takes by itself, as a share of the model's time. Then what each arm's batches
take, in ms an image, and what the model's step does.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from diffusemix_pipeline.devices import is_fast_at_bfloat16
from diffusemix_pipeline.mixing.masks import half_mask
from diffusemix_pipeline.recipes import recipe_of
from diffusemix_pipeline.settings import Training
from diffusemix_pipeline.training import augmentations, loop
from diffusemix_pipeline.training.augmentations import NONE
from diffusemix_pipeline.training.classifier import Classifier, build_classifier, to_tensor
from diffusemix_pipeline.training.data import DecodedImages, LabelledImages

IMAGES = 2000
CLASSES = 10
STEPS = 60  # with one validation: in the demo there is one each 30, by default each 90
PAIRS = 11
MODELS = ("test_resnet", "resnet10t")


def compare(size: int, batch_size: int, device: str) -> dict[str, float]:
    """Return the median ratio of speeds in pairs, its range, and the loop's images a second."""
    training = _training("resnet10t", batch_size)
    with tempfile.TemporaryDirectory() as folder:
        train = _images(size, Path(folder))
        val = train.subset(np.arange(CLASSES))
        classifier = build_classifier("resnet10t", [str(n) for n in range(CLASSES)], size)
        ready = _ready(train, training, device)
        _alone(classifier, ready, training, device)  # the first calls of anything are slower
        batches = loop._Batches(train, training, NONE, seed=0)
        made = _timed(lambda: _make_all(batches))
        making = made / _timed(lambda: _alone(classifier, ready, training, device))
        ratios, speeds = [], []
        for _ in range(PAIRS):
            alone = _timed(lambda: _alone(classifier, ready, training, device))
            whole = _timed(
                lambda: loop.fit(classifier, train, val, training, seed=0, device=device)
            )
            ratios.append(alone / whole)
            speeds.append(STEPS * batch_size / whole)
    return {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "making": making,
        "images_per_second": statistics.median(speeds),
    }


def arm_costs(size: int, batch_size: int, device: str) -> dict[str, float]:
    """Return the ms an image of making each arm's batches, then those of each model's step."""
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        train = _images(size, Path(folder))
        edits = np.arange(IMAGES // 2)  # the second half of the images, each of one in the first
        fractals = list(train.images[np.arange(32)])
        masks = [half_mask(mask, size, size, 0) for mask in ("left", "top")]
        arms = {
            "vanilla, and all that are not named": NONE,
            "trivialaugment": augmentations.trivialaugment(),
            "randaugment": augmentations.randaugment(),
            "augmix": augmentations.augmix(),
            "pixmix": augmentations.pixmix(fractals),
            "diffusemix_online": augmentations.diffusemix_redrawn(
                train.images, edits, masks, fractals, 0.2
            ),
        }
        training = _training(MODELS[0], batch_size)
        for arm, augmentation in arms.items():
            batches = loop._Batches(train, training, augmentation, seed=0)
            costs[arm] = _ms_an_image(partial(_make_all, batches), batch_size)
        for model in MODELS:
            training = _training(model, batch_size)
            classifier = build_classifier(model, [str(n) for n in range(CLASSES)], size)
            ready = _ready(train, training, device)
            steps = partial(_alone, classifier, ready, training, device)
            costs[f"a step of {model}"] = _ms_an_image(steps, batch_size)
    return costs


def _ms_an_image(work: Callable[[], Any], batch_size: int) -> float:
    """Return the median of five turns, after one that does not count."""
    work()
    return 1e3 * statistics.median(_timed(work) for _ in range(5)) / STEPS / batch_size


def _make_all(batches: loop._Batches) -> None:
    for step in range(STEPS):
        batches[step]


def _training(model: str, batch_size: int) -> Training:
    return Training(model=model, batch_size=batch_size, steps=STEPS, validations=1, crop_padding=4)


def _images(size: int, folder: Path) -> LabelledImages:
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8)
    names = [str(number) for number in range(IMAGES)]
    return LabelledImages(DecodedImages(pixels, size, folder), np.arange(IMAGES) % CLASSES, names)


def _ready(
    train: LabelledImages, training: Training, device: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches as tensors on the device."""
    batches = []
    for step in range(STEPS):
        places = loop.places_of_step(step, training.batch_size, len(train), 0)
        labels = torch.from_numpy(train.labels[places]).to(device)
        batches.append((to_tensor(train.images[places], device), labels))
    return batches


def _alone(
    classifier: Classifier,
    ready: list[tuple[torch.Tensor, torch.Tensor]],
    training: Training,
    device: str,
) -> None:
    """Train on ready batches: forward, backward and the optimiser's step, and nothing else."""
    model = classifier.model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = loop._optimizer(model, recipe_of(training))
    half = is_fast_at_bfloat16(device)
    for images, labels in ready:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = ((32, 64), (64, 48))
    found = {f"{size} px, {batch} a step": compare(size, batch, device) for size, batch in sizes}
    costs = {f"{size} px, {batch} a step": arm_costs(size, batch, device) for size, batch in sizes}
    if options.json:
        print(json.dumps({"device": device, **found, "ms_an_image": costs}))
    else:
        for name, of in found.items():
            spread = f"{of['lowest']:.3f} to {of['highest']:.3f}"
            print(
                f"{name}: {of['ratio']:.3f} ({spread}), {of['images_per_second']:.0f} images/s; "
                f"making batches takes {of['making']:.1%} of the model's time"
            )
        print(pd.DataFrame(costs).round(3).to_string())
