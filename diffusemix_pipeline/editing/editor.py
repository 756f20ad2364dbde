"""Editors: what turns images into edits by instructions, found by a name, loaded by a family.

What belongs here: the protocol, the families of diffusers pipelines, finding and checking an
editor's files. What does not: sampling (a module a family), batches and files (`sampling.py`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import digest, file_sha256
from diffusemix_pipeline.settings import Editing

BUNDLED = "bundled"
BUNDLED_WEIGHTS = Path(__file__).parent.parent / "bundled_editor" / "weights"
INDEX = "model_index.json"


class Editor(Protocol):
    """A diffusion model on a device."""

    def edit(
        self, images: np.ndarray, instructions: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray:
        """Edit uint8 (B, S, S, 3) images, each by its instruction and seed, to the same shape.

        An edit depends on the shape of its batch, and on no other member of it. Edits that are no
        numbers raise UserError. Several threads may call at once.
        """

    def check_instruction(self, instruction: str) -> None:
        """Raise UserError for an instruction that the text encoder would cut off."""

    def profile(self) -> dict[str, Any]:
        """Return what the bytes of an edit depend on beside key and batch (DESIGN, promise 2)."""


@dataclass(frozen=True)
class Family:
    """One kind of editor that diffusers can run."""

    pipeline: str
    """The class in diffusers, which a checkpoint's model_index.json names."""
    example: str
    """A checkpoint on the hub."""
    licence: str
    """Of the example's weights; a person's own checkpoint may have another."""
    advice: dict[str, Any]
    """Settings below `editing` that suit the example."""
    parts: tuple[str, ...]
    """Folders of weights, each of which must hold safetensors."""
    load: Callable[[Path, Editing, str], Editor]


def _instruct_pix2pix(folder: Path, editing: Editing, device: str) -> Editor:
    from diffusemix_pipeline.editing.instruct_pix2pix import InstructPix2PixEditor

    return InstructPix2PixEditor(folder, editing, device)


def _instruct_pix2pix_xl(folder: Path, editing: Editing, device: str) -> Editor:
    from diffusemix_pipeline.editing.instruct_pix2pix import InstructPix2PixXLEditor

    return InstructPix2PixXLEditor(folder, editing, device)


FAMILIES = [
    Family(
        "StableDiffusionInstructPix2PixPipeline",
        "timbrooks/instruct-pix2pix",
        "MIT (code), CreativeML OpenRAIL-M (Stable Diffusion 1.5, its base)",
        {"guidance": 4, "image_guidance": 1.5},
        ("unet", "vae", "text_encoder"),
        _instruct_pix2pix,
    ),
    Family(
        "StableDiffusionXLInstructPix2PixPipeline",
        "diffusers/sdxl-instructpix2pix-768",
        "CreativeML OpenRAIL++-M",
        {"guidance": 4, "image_guidance": 1.5},
        ("unet", "vae", "text_encoder", "text_encoder_2"),
        _instruct_pix2pix_xl,
    ),
]


def load_editor(folder: Path, editing: Editing, device: str) -> Editor:
    """Load the editor in a folder that `locate_editor` gave."""
    return _family(folder, str(folder)).load(folder, editing, device)


def locate_editor(editor: str, revision: str | None) -> Path:
    """Return the folder that holds an editor's files, downloading a hub id's safetensors once.

    Raises UserError where the folder holds no pipeline of a known family or the hub gives none.
    """
    if editor == BUNDLED:
        return BUNDLED_WEIGHTS
    folder = Path(editor).expanduser()
    if not folder.is_dir():
        folder = _download(editor, revision)
    for part in _family(folder, editor).parts:
        if not any((folder / part).glob("*.safetensors")):
            raise UserError(
                f"editing.editor: {editor} holds no {part}/*.safetensors. Other formats are not "
                "read, as they may run code: convert it, or have it downloaded again."
            )
    return folder


def editor_fingerprint(folder: Path) -> str:
    """Identify an editor's weights: a hub snapshot by its commit, a folder by its files' bytes."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return digest("hub", folder.parent.parent.name, folder.name)
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".txt"))
    return digest([[p.relative_to(folder).as_posix(), file_sha256(p)] for p in files])


def _family(folder: Path, editor: str) -> Family:
    try:
        found = dict(json.loads((folder / INDEX).read_text("utf-8"))).get("_class_name")
    except (OSError, ValueError, TypeError):
        found = None
    for family in FAMILIES:
        if family.pipeline == found:
            return family
    raise UserError(
        f"editing.editor: {editor} holds {found or f'no readable {INDEX}'}, which is no editor "
        "that is known here: `diffusemix editor list` names them."
    )


def _download(hub_id: str, revision: str | None) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(
                hub_id, revision=revision, use_safetensors=True, safety_checker=None
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"editing.editor: {hub_id} is neither a folder here nor a model that the hub gives "
            f"({reason}). Check the name and the network, or use 'bundled'."
        ) from None
