"""What a training has learnt so far, and the file from which it goes on: nothing is unpickled."""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from diffusemix_pipeline.files import write_bytes

_FORMAT = "2"
Weights = dict[str, torch.Tensor]


@dataclass
class TrainingState:
    """Where a training stands after `step` steps.

    The model and its optimiser are looked at, not copied: writing takes them as they are then.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    best_weights: Weights
    best_accuracy: float = -1.0
    step: int = 0
    points: list[dict[str, float]] = field(default_factory=list)
    """The curve: a point a validation."""
    losses: list[torch.Tensor] = field(default_factory=list)
    """Of the batches since the last validation."""

    @classmethod
    def begin(cls, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> "TrainingState":
        """Return the state before the first step."""
        return cls(model, optimizer, model.state_dict())

    def keep_if_best(self, accuracy: float) -> None:
        """Keep the weights as they are now if no earlier ones had such an accuracy on val."""
        if accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            self.best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def write(self, path: Path, *, aside: Path) -> None:
        """Write everything into one file, whole or not at all; `aside` is on its file system."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best_weights.items()}
        for number, of_weight in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in of_weight.items()}
        tensors |= {f"loss.{number}": loss for number, loss in enumerate(self.losses)}
        facts = {"step": self.step, "best_accuracy": self.best_accuracy, "points": self.points}
        described = {"format": _FORMAT, "facts": json.dumps(facts)}
        # Copies, as a weight may be among the best ones too, and files hold no two names for one.
        copied = {
            name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()
        }
        write_bytes(path, save(copied, described), aside=aside)

    def read(self, path: Path) -> None:
        """Go back to what a training of the same model and recipe wrote into a file.

        Of a file that cannot be read, which a warning names, nothing is taken.
        """
        parts: dict[str, Weights] = {"model": {}, "best": {}, "optimizer": {}, "loss": {}}
        try:
            with safe_open(path, "pt") as file:
                described = file.metadata() or {}
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    part, name = key.split(".", 1)
                    parts[part][name] = file.get_tensor(key)
        except SafetensorError as error:
            warnings.warn(f"{path} cannot be read ({error}): training begins anew.", stacklevel=2)
            return
        if described.get("format") != _FORMAT:
            warnings.warn(f"{path} is of another version: training begins anew.", stacklevel=2)
            return
        facts = json.loads(described["facts"])
        self.step, self.best_accuracy = facts["step"], facts["best_accuracy"]
        self.points = facts["points"]
        self.model.load_state_dict(parts["model"])
        self.best_weights = parts["best"] or self.best_weights
        state: dict[int, dict[str, Any]] = {}
        for name, value in parts["optimizer"].items():
            number, its = name.split(".", 1)
            # As its weight lies in memory: reading takes that from the file.
            how = torch.channels_last if value.ndim == 4 else torch.contiguous_format
            state.setdefault(int(number), {})[its] = value.contiguous(memory_format=how)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        device = next(self.model.parameters()).device
        losses = parts["loss"]
        self.losses = [losses[str(number)].to(device) for number in range(len(losses))]
