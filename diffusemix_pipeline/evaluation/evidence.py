"""Evidence: what classifiers did with every test image, clean, attacked and corrupted.

What belongs here: asking classifiers, and keeping their answers so that a report can be made again
without them. What does not: what follows from them (calibration, statistics, report).
"""

import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from diffusemix_pipeline.arrays import read_arrays, write_arrays
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.attacks import (
    PGD_STEPS,
    fgsm,
    gradient,
    pgd,
    survives_autoattack,
)
from diffusemix_pipeline.evaluation.corruptions import corrupt
from diffusemix_pipeline.evaluation.published_corruptions import CorruptedSet
from diffusemix_pipeline.files import BEGUN, replaced_folder, undamaged
from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Corruption, Evaluation
from diffusemix_pipeline.training.classifier import to_tensor
from diffusemix_pipeline.training.data import LabelledImages

# Raised where the attacks or the corruptions change, so that no two codes are compared.
CODE_VERSION = "5"
FILE = "evidence.npz"
_AUTOATTACKED_AT_ONCE = 32  # images: what a cut-off costs
Name = TypeVar("Name", bound=Hashable)


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
    attack_epsilon: float
    """The strength of PGD and AutoAttack, in units of 1/255; of `epsilons`, if there are any."""
    attacked: np.ndarray
    """int64 (M,): which images PGD attacked; AutoAttack attacked the first A of them."""
    pgd: np.ndarray
    """bool (M,): whether the answer was right on the attacked image."""
    autoattack: np.ndarray
    """bool (A,), A <= M: whether the answer stayed right under every attack of the ensemble."""
    corruptions: tuple[str, ...]
    """F families."""
    severities: tuple[int, ...]
    """S severities, rising."""
    corrupted: np.ndarray
    """bool (F, S, N): whether the answer was right on the corrupted image."""
    published_sets: tuple[str, ...]
    """P published sets of corrupted images, as family/severity."""
    published: np.ndarray
    """bool (P, M'): whether the answer was right on each set's own images, which are not the N."""

    @property
    def correct(self) -> np.ndarray:
        """bool (N,): whether the answer was right on the clean image."""
        return self.probabilities.argmax(axis=1) == self.labels

    def save(self, folder: Path) -> None:
        """Write `evidence.npz` into `folder`: one file, so that it is there as a whole or not."""
        write_arrays(folder / FILE, {name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def load(cls, folder: Path) -> "Evidence":
        """Read what `save` wrote; UserError where it is missing or damaged."""
        path = folder / FILE
        repair = f"Remove {folder} and run again: the classifier is then asked anew."
        if not path.exists():
            raise UserError(f"{path} is not there. {repair}")
        with undamaged(path, repair):
            values: dict[str, Any] = read_arrays(path, _FIELDS)
            values |= {name: tuple(values[name].tolist()) for name in _AXES}
            values["attack_epsilon"] = float(values["attack_epsilon"])
        return cls(**values)


_FIELDS = tuple(field.name for field in fields(Evidence))
_RIGHT = "right"  # the one array of a file of partial answers
_AXES = ("ids", "epsilons", "corruptions", "severities", "published_sets")


def asked_of(evaluation: Evaluation) -> dict[str, Any]:
    """Return what decides the answers, but for published sets, which their content tells apart."""
    return evaluation.model_dump(exclude={"bootstrap_samples", "batch_size", "corrupted_sets"})


def evaluate(
    models: Mapping[Name, nn.Module],
    test: LabelledImages,
    evaluation: Evaluation,
    seed: int,
    device: torch.device | str,
    *,
    partial: Mapping[Name, Path],
    sets: Sequence[CorruptedSet] = (),
    progress: Progress = silent,
) -> Iterator[tuple[Name, Evidence]]:
    """Ask `models` about every test image, and give each one's name and answers when it is through.

    A model takes float32 (N, 3, H, W) in [0, 1] and gives logits. All draws follow from `seed` and
    images' ids, so all models are asked about the same corrupted pixels, which are made once. What
    is known before a model is through, of a family of corruption or of AutoAttack, is kept in its
    folder of `partial`, and taken from there: a cut-off costs little.
    """
    if not len(test):
        raise UserError("There are no test images to evaluate on: see source.test_fraction.")
    for model in models.values():
        model.to(device).eval()
    strengths = evaluation.fgsm_epsilons
    epsilons = tuple(sorted({*strengths, evaluation.attack_epsilon})) if strengths else ()
    families: tuple[Corruption, ...] = tuple(dict.fromkeys(evaluation.corruptions))
    severities = tuple(sorted(set(evaluation.severities)))
    chosen = _chosen(test.ids, evaluation.attack_images, seed)
    attacked = test.subset(chosen)
    few = test.subset(chosen[: evaluation.autoattack_images])
    passes = len(test) * (1 + len(epsilons) + len(families) * len(severities))
    steps = len(attacked) * PGD_STEPS + sum(len(one.labels) for one in sets)
    ask = _Ask(
        evaluation, seed, torch.device(device), _counted(progress, (passes + steps) * len(models))
    )
    published = ask.published(models, sets, test.images[:1].shape[1], partial)
    corrupted = ask.corrupted(models, test, families, severities, partial)
    for name, model in models.items():
        probabilities, moved = ask.clean_and_fgsm(model, test, epsilons)
        yield (
            name,
            Evidence(
                ids=tuple(test.ids),
                labels=test.labels,
                probabilities=probabilities,
                epsilons=epsilons,
                fgsm=moved,
                attack_epsilon=float(evaluation.attack_epsilon),
                attacked=chosen,
                pgd=ask.pgd(model, attacked),
                autoattack=ask.autoattack(model, few, partial[name], progress),
                corruptions=families,
                severities=severities,
                corrupted=corrupted[name],
                published_sets=tuple(one.name for one in sets),
                published=published[name],
            ),
        )


def ask_and_keep(
    models: Mapping[Name, nn.Module],
    folders: Mapping[Name, Path],
    test: LabelledImages,
    evaluation: Evaluation,
    seed: int,
    device: torch.device | str,
    *,
    aside: Path,
    sets: Sequence[CorruptedSet] = (),
    progress: Progress = silent,
) -> None:
    """Ask `models` about every test image as `evaluate` does, and save each one's in its folder.

    What is known before a model is through lies beside its folder. `aside` lies on the same file
    system as the folders.
    """
    begun = {name: folder.with_name(f"{folder.name}{BEGUN}") for name, folder in folders.items()}
    answers = evaluate(
        models, test, evaluation, seed, device, partial=begun, sets=sets, progress=progress
    )
    for name, evidence in answers:
        with replaced_folder(folders[name], mark=FILE, aside=aside) as folder:
            evidence.save(folder)
        shutil.rmtree(begun[name], ignore_errors=True)


def _chosen(ids: Sequence[str], most: int, seed: int) -> np.ndarray:
    """Choose which images costly attacks are tried on: places int64 (M,), in a drawn order."""
    order = sorted(range(len(ids)), key=lambda place: seed_from(seed, "attacked", ids[place]))
    return np.array(order[:most], np.int64)


@dataclass(frozen=True)
class _Ask:
    """How questions are put; `tell` counts an image's forward and gradient passes."""

    evaluation: Evaluation
    seed: int
    device: torch.device
    tell: Callable[[int], None]

    def corrupted(
        self,
        models: Mapping[Name, nn.Module],
        test: LabelledImages,
        families: Sequence[Corruption],
        severities: Sequence[int],
        partial: Mapping[Name, Path],
    ) -> dict[Name, np.ndarray]:
        """Return bool (F, S, N) of each model: whether it was right on the corrupted image."""
        found = {
            name: np.zeros((len(families), len(severities), len(test)), bool) for name in models
        }
        for row, family in enumerate(families):
            files = {name: folder / f"{family}.npz" for name, folder in partial.items()}

            def ask(family: Corruption = family) -> dict[Name, np.ndarray]:
                right = {name: np.zeros((len(severities), len(test)), bool) for name in models}
                for batch, pixels, labels in self._batches(test):
                    for column, severity in enumerate(severities):
                        changed = corrupt(pixels, family, severity, test.ids[batch], self.seed)
                        images = to_tensor(changed, self.device)
                        for name, model in models.items():
                            right[name][column, batch] = _right(model, images, labels)
                return right

            for name, right in _kept(files, ask).items():
                found[name][row] = right
            self.tell(len(models) * len(severities) * len(test))
        return found

    def published(
        self,
        models: Mapping[Name, nn.Module],
        sets: Sequence[CorruptedSet],
        size: int,
        partial: Mapping[Name, Path],
    ) -> dict[Name, np.ndarray]:
        """Return bool (P, M') of each model: whether it was right on the published images."""
        count, step = len(sets[0].labels) if sets else 0, self.evaluation.batch_size
        found = {name: np.zeros((len(sets), count), bool) for name in models}
        for row, one in enumerate(sets):
            files = {name: folder / f"published-{row:04d}.npz" for name, folder in partial.items()}

            def ask(one: CorruptedSet = one) -> dict[Name, np.ndarray]:
                right = {name: np.zeros(count, bool) for name in models}
                for start in range(0, count, step):
                    batch = slice(start, min(start + step, count))
                    images = to_tensor(one.read(batch.start, batch.stop, size), self.device)
                    labels = torch.from_numpy(one.labels[batch]).to(self.device)
                    for name, model in models.items():
                        right[name][batch] = _right(model, images, labels)
                return right

            for name, right in _kept(files, ask).items():
                found[name][row] = right
            self.tell(len(models) * count)
        return found

    def clean_and_fgsm(
        self, model: nn.Module, test: LabelledImages, epsilons: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return probabilities float32 (N, C), and bool (E, N): right on the attacked image."""
        probabilities, found = [], np.zeros((len(epsilons), len(test)), bool)
        for batch, pixels, labels in self._batches(test):
            clean = to_tensor(pixels, self.device)
            if epsilons:
                slope, logits = gradient(model, clean, labels)  # one pass, whatever the strengths
            else:
                with torch.no_grad():
                    logits = model(clean)
            probabilities.append(logits.float().softmax(dim=1).cpu().numpy())
            for row, epsilon in enumerate(epsilons):
                found[row, batch] = _right(model, fgsm(clean, slope, epsilon / 255), labels)
            self.tell((1 + len(epsilons)) * len(labels))
        return np.concatenate(probabilities), found

    def pgd(self, model: nn.Module, test: LabelledImages) -> np.ndarray:
        """Return bool (M,): whether the answer was right on the attacked image."""
        found, epsilon = np.zeros(len(test), bool), self.evaluation.attack_epsilon / 255
        for batch, pixels, labels in self._batches(test):
            images = to_tensor(pixels, self.device)
            start = torch.from_numpy(self._starts(test.ids[batch], images.shape)).to(self.device)
            found[batch] = _right(model, pgd(model, images, labels, epsilon, start), labels)
            self.tell(PGD_STEPS * len(labels))
        return found

    def autoattack(
        self, model: nn.Module, test: LabelledImages, kept: Path, progress: Progress
    ) -> np.ndarray:
        """Return bool (A,): whether the answer stayed right; `kept` holds what is known already."""
        found = np.zeros(len(test), bool)
        for start in range(0, len(test), _AUTOATTACKED_AT_ONCE):
            progress("AutoAttack", start, len(test))
            places = np.arange(start, min(start + _AUTOATTACKED_AT_ONCE, len(test)))
            file = kept / f"autoattack-{start:06d}.npz"
            survived = _kept_answers(file)
            if survived is None:
                labels = torch.from_numpy(test.labels[places]).to(self.device)
                images = to_tensor(test.images[places], self.device)
                seed = seed_from(self.seed, "autoattack", [test.ids[place] for place in places])
                epsilon = self.evaluation.attack_epsilon / 255
                answers = survives_autoattack(model, images, labels, epsilon, seed)
                survived = answers.cpu().numpy()
                write_arrays(file, {_RIGHT: survived})
            found[places] = survived
        if len(test):
            progress("AutoAttack", len(test), len(test))
        return found

    def _batches(self, test: LabelledImages) -> Iterator[tuple[slice, np.ndarray, Tensor]]:
        """Yield where a batch lies, its pixels uint8 (B, H, W, 3), and its labels int64 (B,)."""
        for start in range(0, len(test), self.evaluation.batch_size):
            batch = slice(start, min(start + self.evaluation.batch_size, len(test)))
            yield batch, test.images[batch], torch.from_numpy(test.labels[batch]).to(self.device)

    def _starts(self, ids: Sequence[str], shape: Sequence[int]) -> np.ndarray:
        """Return float32 `shape` in [-1, 1): where PGD begins, of each image by its id."""
        starts = np.empty(shape, np.float32)
        for start, image_id in zip(starts, ids, strict=True):
            generator = np.random.default_rng(seed_from(self.seed, "pgd", image_id))
            start[:] = 2 * generator.random(shape[1:], np.float32) - 1
        return starts


def _kept(
    files: Mapping[Name, Path], ask: Callable[[], dict[Name, np.ndarray]]
) -> dict[Name, np.ndarray]:
    """Return the answers that lie in `files`, or what `ask` gives where one is not there whole."""
    answers = {name: _kept_answers(file) for name, file in files.items()}
    kept = {name: right for name, right in answers.items() if right is not None}
    if len(kept) == len(files):
        return kept
    asked = ask()
    for name, right in asked.items():
        write_arrays(files[name], {_RIGHT: right})
    return asked


def _kept_answers(file: Path) -> np.ndarray | None:
    """Return what was kept before a cut-off; None where it is missing or damaged: ask again."""
    if not file.exists():
        return None
    try:
        with undamaged(file, ""):
            return read_arrays(file, [_RIGHT])[_RIGHT]
    except UserError:
        return None


def _counted(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        progress("Evaluating images", done, total)

    return tell


@torch.no_grad()
def _right(model: nn.Module, images: Tensor, labels: Tensor) -> np.ndarray:
    """Return bool (B,): whether the model names the label."""
    return (model(images).argmax(dim=1) == labels).cpu().numpy()
