"""A classifier: a timm model with its normalisation inside, its classes, and its folder on disk.

Its folder holds `model.safetensors` and `classifier.json`; nothing in it is ever unpickled.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from diffusemix_pipeline.datasets.images import MAX_PIXELS, read_rgb, to_square
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import undamaged, write_json

if TYPE_CHECKING:  # serving needs no manifests
    from diffusemix_pipeline.training.data import Images

WEIGHTS = "model.safetensors"
DESCRIPTION = "classifier.json"


class NormalizedModel(nn.Module):
    """A timm model that takes float (N, 3, H, W) in [0, 1] and gives logits (N, K).

    Normalising inside the model keeps attacks, corruptions and serving in plain pixels.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone((images - self.mean) / self.std)


@dataclass(frozen=True)
class Classifier:
    """A model, its name in timm, its class names by index, and its input's side in px."""

    model: NormalizedModel
    name: str
    classes: tuple[str, ...]
    size: int

    def prepare(self, image: Path | str | Image.Image) -> np.ndarray:
        """Return an image file or picture as uint8 (size, size, 3), as in training."""
        if not isinstance(image, Image.Image):
            image = read_rgb(Path(image), MAX_PIXELS)
        return to_square(image.convert("RGB"), self.size)

    def features(self, images: np.ndarray) -> np.ndarray:
        """Return what the last layer sees, float32 (N, F), of uint8 (N, size, size, 3) images."""
        backbone: Any = self.model.backbone
        with torch.inference_mode():
            pixels = to_tensor(images, self.model.mean.device)
            found = backbone.forward_features((pixels - self.model.mean) / self.model.std)
            return backbone.forward_head(found, pre_logits=True).float().cpu().numpy()

    def predict_proba(self, images: "Images", batch_size: int = 256) -> np.ndarray:
        """Return class probabilities float32 (N, K) of uint8 (N, size, size, 3) images."""
        device = self.model.mean.device
        self.model.eval()
        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                logits = self.model(to_tensor(images[start : start + batch_size], device))
                parts.append(logits.float().softmax(dim=1).cpu().numpy())
        return np.concatenate(parts)


def check_model(name: str, size: int, pretrained: str | None) -> None:
    """Raise UserError for a model that timm does not know, fetch, or build for `size`.

    `pretrained` is the commit of its weights on the hub, if it starts from them.
    """
    if not _is_known(name):
        near = difflib.get_close_matches(name, [*_OWN, *timm.list_models()], n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "See timm.list_models()."
        raise UserError(f"training.model: timm has no model '{name}'. {hint}")
    try:
        with torch.device("meta"):
            classifier = build_classifier(name, ["a", "b"], size)
            classifier.model.eval()(torch.empty(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"training.model: {name} does not take images of {size} px ({error}). "
            "Choose another model or a larger size."
        ) from None
    if pretrained:
        if name in _OWN:
            raise UserError(f"training.pretrained: no weights of {name} exist: set it to false.")
        try:
            build_classifier(name, ["a", "b"], size, pretrained=pretrained)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"training.pretrained: the weights of {name} cannot be had as {WEIGHTS} at "
                f"training.revision {pretrained} ({error}). Check both and the network, or set "
                "training.pretrained to false."
            ) from None


def build_classifier(
    name: str, classes: Sequence[str], size: int, *, pretrained: str | None = None
) -> Classifier:
    """Build a model by name for `classes`; see `check_model` for what cannot be built.

    It starts from the weights of the commit `pretrained` on the hub, if that is given.
    """
    backbone: Any
    if name in _OWN:
        backbone = _OWN[name](len(classes))
    else:
        fixed = {"img_size": size} if _takes_image_size(name) else {}
        pinned = _pinned(name, pretrained) if pretrained else {}
        backbone = timm.create_model(name, num_classes=len(classes), **pinned, **fixed)
    config = backbone.pretrained_cfg
    model = NormalizedModel(backbone, config["mean"], config["std"])
    return Classifier(model, name, tuple(classes), size)


def _pinned(name: str, commit: str) -> dict[str, Any]:
    """Return how timm is told to take a model's weights from one commit, and as safetensors.

    By itself it takes the newest, and where there are no safetensors it unpickles.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise OSError(f"timm knows no weights of {name} on the hub")
    place = {"hf_hub_id": f"{config.hf_hub_id}@{commit}", "hf_hub_filename": WEIGHTS}
    overlay = {"source": "hf-hub", "custom_load": False, **place}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def _preact_resnet18(classes: int) -> nn.Module:
    """Build ResNet-18 with pre-activation for small images: no stride and no pooling in its stem.

    Source: He et al., Identity Mappings in Deep Residual Networks (2016), section 4 and appendix.
    """
    backbone = timm.create_model("resnetv2_18", num_classes=classes)
    backbone.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.stem.weight, mode="fan_out", nonlinearity="relu")
    return backbone


# The models that timm does not have under a name of their own.
_OWN = {"preact_resnet18": _preact_resnet18}


def _is_known(name: str) -> bool:
    """Tell whether a model is built here, from code that is installed; hub ids are not."""
    return name in _OWN or timm.is_model(name)


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write a classifier's files into an existing folder."""
    weights = {key: value.contiguous() for key, value in classifier.model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    description = {
        "model": classifier.name,
        "classes": list(classifier.classes),
        "size": classifier.size,
        "mean": classifier.model.mean.flatten().tolist(),
        "std": classifier.model.std.flatten().tolist(),
    }
    write_json(folder / DESCRIPTION, description)


def trained_anew(folder: Path) -> str:
    """Say what to do where a file of a classifier's folder is damaged."""
    return f"Remove {folder} and run again: it is trained anew."


def load_classifier(folder: Path, device: str = "cpu", repair: str = "") -> Classifier:
    """Read a classifier's folder back, onto a device, in evaluation mode.

    It may come from a store of models: UserError for weights that are no safetensors and for a
    model that is not known here. `repair` says what to do where it is not to be trained anew.
    """
    repair = repair or trained_anew(folder)
    with undamaged(folder / DESCRIPTION, repair):
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        name, classes = description["model"], description["classes"]
        size, mean, std = (description[key] for key in ("size", "mean", "std"))
    if not _is_known(name):
        raise UserError(
            f"{folder} holds a model '{name}', which timm does not know: train it anew."
        )
    classifier = build_classifier(name, classes, size)
    model = NormalizedModel(classifier.model.backbone, mean, std)
    with undamaged(folder / WEIGHTS, repair):
        model.load_state_dict(load_file(folder / WEIGHTS))
    model.eval().to(device)
    return Classifier(model, classifier.name, classifier.classes, classifier.size)


def broken_weights(folder: Path) -> list[str]:
    """Name the weights of a classifier's folder that are not all finite."""
    with undamaged(folder / WEIGHTS, trained_anew(folder)):
        weights = load_file(folder / WEIGHTS)
    return [name for name, values in weights.items() if not torch.isfinite(values).all()]


def to_tensor(
    images: np.ndarray | torch.Tensor, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Turn uint8 (N, H, W, 3) into float (N, 3, H, W) in [0, 1] on a device."""
    on_device = torch.as_tensor(images).to(device, non_blocking=True)
    return on_device.permute(0, 3, 1, 2).float() / 255


def _takes_image_size(name: str) -> bool:
    """Tell whether a timm model is built for one input size (vision transformers and their kin)."""
    config = timm.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size)
