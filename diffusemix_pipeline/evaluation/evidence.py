"""Evidence: what one classifier did with every test image, clean, attacked and corrupted.

What belongs here: asking the classifier, and keeping its answers so that a report can be made again
without it. What does not: what follows from them (calibration, statistics, report).
"""

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.attacks import fgsm
from diffusemix_pipeline.evaluation.corruptions import corrupt
from diffusemix_pipeline.files import write_bytes
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Corruption, Evaluation
from diffusemix_pipeline.training.classifier import to_tensor
from diffusemix_pipeline.training.data import Images

# Raised where the attacks or the corruptions change, so that no two codes are compared.
CODE_VERSION = "2"
FILE = "evidence.npz"


@dataclass(frozen=True, eq=False)
class Evidence:
    """One classifier's answers on N test images of C classes."""

    ids: tuple[str, ...]
    """What tells N images apart (SHA-256 of their files): the corruptions' draws follow from it."""
    labels: np.ndarray
    """int64 (N,)."""
    probabilities: np.ndarray
    """float32 (N, C): of the clean images."""
    epsilons: tuple[float, ...]
    """E strengths of FGSM, in units of 1/255, rising."""
    fgsm: np.ndarray
    """bool (E, N): whether the answer was right on the attacked image."""
    corruptions: tuple[str, ...]
    """F families."""
    severities: tuple[int, ...]
    """S severities, rising."""
    corrupted: np.ndarray
    """bool (F, S, N): whether the answer was right on the corrupted image."""

    @property
    def correct(self) -> np.ndarray:
        """bool (N,): whether the answer was right on the clean image."""
        return self.probabilities.argmax(axis=1) == self.labels

    def save(self, folder: Path) -> None:
        """Write `evidence.npz` into `folder`: one file, so that it is there as a whole or not."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: getattr(self, name) for name in _FIELDS})
        write_bytes(folder / FILE, buffer.getvalue())

    @classmethod
    def load(cls, folder: Path) -> "Evidence":
        """Read what `save` wrote; UserError where it is missing or damaged."""
        try:
            with np.load(folder / FILE, allow_pickle=False) as arrays:
                values: dict[str, Any] = {name: arrays[name] for name in _FIELDS}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{folder / FILE} cannot be read ({error}). Delete {folder} and run again: the "
                "classifier is then asked anew."
            ) from None
        values |= {name: tuple(values[name].tolist()) for name in _AXES}
        return cls(**values)


_FIELDS = tuple(field.name for field in fields(Evidence))
_AXES = tuple(field.name for field in fields(Evidence) if field.type is not np.ndarray)


def evaluate(
    model: nn.Module,
    images: Images,
    labels: np.ndarray,
    ids: Sequence[str],
    evaluation: Evaluation,
    seed: int,
    device: torch.device | str,
    progress: Progress = silent,
) -> Evidence:
    """Ask `model` about every test image: clean, under each FGSM strength and each corruption.

    `images` are uint8 (N, H, W, 3), read a batch at a time, `labels` int64 (N,), `ids` N names.
    `model` takes float32 (N, 3, H, W) in [0, 1] and gives logits. The draws of the corruptions
    follow from `seed` and each image's id, so every arm is asked about the same pixels.
    """
    if not len(ids):
        raise UserError("There are no test images to evaluate on: see source.test_fraction.")
    labels = np.asarray(labels, dtype=np.int64)
    epsilons = tuple(sorted(set(evaluation.fgsm_epsilons)))
    families: tuple[Corruption, ...] = tuple(dict.fromkeys(evaluation.corruptions))
    severities = tuple(sorted(set(evaluation.severities)))
    probabilities: list[np.ndarray] = []
    attacked = np.zeros((len(epsilons), len(ids)), dtype=bool)
    corrupted = np.zeros((len(families), len(severities), len(ids)), dtype=bool)
    model = model.to(device).eval()

    def right(pixels: Tensor, truth: np.ndarray) -> np.ndarray:
        return _probabilities(model, pixels).argmax(axis=1) == truth

    passes = 1 + len(epsilons) + len(families) * len(severities)
    tell = _counted(progress, passes * len(ids))
    for start in range(0, len(ids), evaluation.batch_size):
        batch = slice(start, min(start + evaluation.batch_size, len(ids)))
        pixels, truth = images[batch], labels[batch]
        clean, answers = to_tensor(pixels, device), torch.from_numpy(truth).to(device)
        probabilities.append(_probabilities(model, clean))
        tell(len(truth))
        for row, epsilon in enumerate(epsilons):
            attacked[row, batch] = right(fgsm(model, clean, answers, epsilon / 255), truth)
            tell(len(truth))
        for row, family in enumerate(families):
            for column, severity in enumerate(severities):
                changed = corrupt(pixels, family, severity, ids[batch], seed)
                corrupted[row, column, batch] = right(to_tensor(changed, device), truth)
                tell(len(truth))
    return Evidence(
        ids=tuple(ids),
        labels=labels,
        probabilities=np.concatenate(probabilities),
        epsilons=epsilons,
        fgsm=attacked,
        corruptions=families,
        severities=severities,
        corrupted=corrupted,
    )


def _counted(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        progress("Evaluating test images", done, total)

    return tell


@torch.no_grad()
def _probabilities(model: nn.Module, pixels: Tensor) -> np.ndarray:
    return model(pixels).float().softmax(dim=1).cpu().numpy()
