"""Editors: what turns images into edits by instructions, found by a name, loaded by a family.

What belongs here: the protocol, the families of diffusers pipelines, finding and checking the files
and settings of an editor. What does not: sampling (a module a family), batches (`sampling.py`).
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffusemix_pipeline.errors import UserError, first_line
from diffusemix_pipeline.identity import digest, file_sha256
from diffusemix_pipeline.own_code import is_own, own_code
from diffusemix_pipeline.settings import Editing

BUNDLED = "bundled"
BUNDLED_WEIGHTS = Path(__file__).parent.parent / "bundled_editor" / "weights"
INDEX = "model_index.json"
_LOADED = [["json"], ["safetensors"], ["txt"], ["jinja"], ["safetensors", "index", "json"]]
"""How files of weights and words end; jinja: chat templates."""
_UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}
"""Parts that a checkpoint may hold and no editor here loads."""
_LIBRARIES = {"diffusers", "transformers", None}
"""Whose classes the parts of a checkpoint may have: code of its own is never run."""
_SHARD = re.compile(r"[^/\\]+\.safetensors")
_HUB_FILE = re.compile(r"(?P<repository>[^/@]+/[^/@]+)@(?P<commit>[0-9a-f]{40})/(?P<file>.+)")
_WITHOUT = {
    "guidance": 1,
    "image_guidance": 1,
    "guidance_from": 0,
    "guidance_until": 1,
    "lora": "",
}
"""Values that ask nothing of an editor."""


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
        """Return what the bytes of an edit depend on beside key and batch.

        Within one profile, the same key gives the same bytes.
        """


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
    load: Callable[[Path, Editing, str, Path | None], Editor]
    batches: bool = True
    """Whether it edits `editing.batch_size` images at once; else one."""
    samplers: tuple[str, ...] = ("dpmsolver++", "euler_ancestral", "checkpoint")
    lacks: tuple[str, ...] = ()
    """Settings below `editing` that it cannot honour."""


def _instruct_pix2pix(folder: Path, editing: Editing, device: str, lora: Path | None) -> Editor:
    from diffusemix_pipeline.editing.instruct_pix2pix import InstructPix2PixEditor

    return InstructPix2PixEditor(folder, editing, device, lora)


def _instruct_pix2pix_xl(folder: Path, editing: Editing, device: str, lora: Path | None) -> Editor:
    from diffusemix_pipeline.editing.instruct_pix2pix import InstructPix2PixXLEditor

    return InstructPix2PixXLEditor(folder, editing, device, lora)


def _few_step(folder: Path, editing: Editing, device: str, lora: Path | None) -> Editor:
    from diffusemix_pipeline.editing.few_step import FewStepEditor

    return FewStepEditor(folder, editing, device, lora)


def _transformer(
    pipeline: str, example: str, licence: str, advice: dict[str, Any], lacks: tuple[str, ...] = ()
) -> Family:
    return Family(
        pipeline,
        example,
        licence,
        {"sampler": "checkpoint", **advice},
        ("transformer", "vae", "text_encoder"),
        _few_step,
        batches=False,
        samplers=("checkpoint",),
        lacks=("image_guidance", "guidance_from", "guidance_until", *lacks),
    )


_LIGHTNING = "lightx2v/Qwen-Image-Lightning@COMMIT"
"""LoRA on the hub, Apache-2.0."""
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
    _transformer(
        "Flux2KleinPipeline",
        "black-forest-labs/FLUX.2-klein-4B",
        "Apache-2.0 (the 9B checkpoints: non-commercial)",
        {"steps": 4, "guidance": 1},
    ),
    _transformer(
        "QwenImageEditPipeline",
        "Qwen/Qwen-Image-Edit",
        "Apache-2.0",
        {
            "steps": 8,
            "guidance": 1,
            "lora": f"{_LIGHTNING}/Qwen-Image-Edit-Lightning-8steps-V1.0-bf16.safetensors",
        },
    ),
    _transformer(
        "QwenImageEditPlusPipeline",
        "Qwen/Qwen-Image-Edit-2509",
        "Apache-2.0",
        {
            "steps": 8,
            "guidance": 1,
            "lora": f"{_LIGHTNING}/Qwen-Image-Edit-2509/"
            "Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16.safetensors",
        },
    ),
    _transformer(
        "LongCatImageEditPipeline",
        "meituan-longcat/LongCat-Image-Edit-Turbo",
        "Apache-2.0",
        {"steps": 8, "guidance": 1},
        lacks=("lora",),
    ),
]


_OWN = "Editor"
"""What a Python file of the user's own defines: called with `Editing` and a device's name."""


def _own(file: Path, editing: Editing, device: str, lora: Path | None) -> Editor:
    editor: Editor = own_code("editing.editor", str(file), _OWN)(editing, device)
    return editor


_OF_ONES_OWN = Family(
    "a Python file", "FILE.py", "the user's", {}, (), _own, lacks=("lora",)
)  # it honours what it likes of the rest


def load_editor(folder: Path, editing: Editing, device: str) -> Editor:
    """Load the editor that `locate_editor` gave, with its LoRA; UserError as below."""
    check_honoured(folder, editing)
    return _family(folder, str(folder)).load(folder, editing, device, locate_lora(editing.lora))


def check_honoured(folder: Path, editing: Editing) -> None:
    """Raise one UserError that names every setting which the editor in `folder` cannot honour.

    A default was asked for by nobody: of what an editor lacks, other values alone are refused.
    """
    family = _family(folder, str(folder))
    repairs: dict[str, Any] = {}
    if editing.sampler not in family.samplers:
        repairs["sampler"] = family.samplers[0]
    distilled = ("guidance",) if _index(folder).get("is_distilled") else ()
    for name in (*family.lacks, *distilled):
        if getattr(editing, name) not in (_WITHOUT[name], Editing.model_fields[name].default):
            repairs[name] = _WITHOUT[name]
    if repairs:
        asked = ", ".join(f"editing.{name}={getattr(editing, name)}" for name in repairs)
        repaired = ", ".join(f"editing.{name}={value}" for name, value in repairs.items())
        raise UserError(
            f"{asked}: the editor {editing.editor} ({family.pipeline}) cannot do that. "
            f"Set {repaired}; `diffusemix editor list` names the settings that suit it."
        )


def edits_at_once(folder: Path, editing: Editing) -> int:
    """Return how many edits one call should hold: an editor of one at a time is not padded."""
    return editing.batch_size if _family(folder, str(folder)).batches else 1


def locate_editor(editor: str, revision: str | None) -> Path:
    """Return the folder that holds an editor's files, downloading a hub id's safetensors once.

    Of one that is Python, it is the file. Raises UserError where the folder holds no pipeline of a
    known family or the hub gives none, for a hub id without a commit, and for what is no
    safetensors or would run code.
    """
    if editor == BUNDLED:
        return BUNDLED_WEIGHTS
    if is_own(editor):
        own_code("editing.editor", editor, _OWN)
        return Path(editor).expanduser()
    folder = Path(editor).expanduser()
    if not folder.is_dir():
        folder = _download(editor, revision)
    for part in _family(folder, editor).parts:
        if not any((folder / part).glob("*.safetensors")):
            raise UserError(
                f"editing.editor: {editor} holds no {part}/*.safetensors. Other formats are not "
                "read, as they may run code: convert it, or have it downloaded again."
            )
    for part, of in _parts(folder).items():
        if of[0] not in _LIBRARIES:
            raise UserError(
                f"editing.editor: {editor} asks for code of its own, {of[0]}, for its {part}. "
                "It is never run: name another checkpoint."
            )
    for index in sorted(folder.glob("*/*.safetensors.index.json")):
        for shard in _json(index).get("weight_map", {}).values():
            if not _SHARD.fullmatch(str(shard)):
                raise UserError(
                    f"editing.editor: {index} names {shard}, which is no safetensors file beside "
                    "it. Other formats are not read, as they may run code: convert it."
                )
    return folder


def locate_lora(lora: str) -> Path | None:
    """Return the file that `editing.lora` names, downloading a hub's once; None for none.

    Raises UserError for what is no safetensors file, here or at a commit on the hub.
    """
    if not lora:
        return None
    if not lora.endswith(".safetensors"):
        raise UserError(
            f"editing.lora: {lora} is no .safetensors file. Other formats are not read, as they "
            "may run code: name a file, or owner/name@COMMIT/FILE.safetensors on the hub."
        )
    path = Path(lora).expanduser()
    return path if path.is_file() else _download_lora(lora)


def editor_fingerprint(folder: Path, lora: Path | None) -> str:
    """Identify an editor's weights, with its LoRA's bytes."""
    weights = _weights_fingerprint(folder)
    return digest(weights, "lora", _sha256(lora)) if lora else weights


def _weights_fingerprint(folder: Path) -> str:
    """Identify an editor by the bytes of its parts' files, in a folder or in the hub's cache.

    What the pipeline does not load is left out: other programs may put variants (`.fp16.`) there.
    """
    if is_own(folder.name):
        return file_sha256(folder)[:32]
    files = [
        p
        for part in sorted(_parts(folder))
        for p in sorted((folder / part).rglob("*"))
        if _is_loaded(p)
    ]
    files.append(folder / INDEX)
    return digest([[p.relative_to(folder).as_posix(), _sha256(p)] for p in files])


def _is_loaded(path: Path) -> bool:
    _, *ending = path.name.split(".")
    return ending in _LOADED


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file that may hold tens of gigabytes, reading it once a process."""
    real = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", real.name):  # the hub's cache names large files by it
        return real.name
    found = real.stat()
    return _sha256_of(real, found.st_size, found.st_mtime_ns)


@lru_cache
def _sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    return file_sha256(path)


def _parts(folder: Path) -> dict[str, list[Any]]:
    """Return the library and the class of each part that an editor loads."""
    index = _index(folder)
    return {k: v for k, v in index.items() if isinstance(v, list) and k not in _UNUSED}


def _index(folder: Path) -> dict[str, Any]:
    return _json(folder / INDEX)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _family(folder: Path, editor: str) -> Family:
    if is_own(folder.name):
        return _OF_ONES_OWN
    found = _index(folder).get("_class_name")
    for family in FAMILIES:
        if family.pipeline == found:
            return family
    raise UserError(
        f"editing.editor: {editor} holds {found or f'no readable {INDEX}'}, which is no editor "
        "that is known here: `diffusemix editor list` names them."
    )


def _download(hub_id: str, revision: str | None) -> Path:
    from diffusers import DiffusionPipeline

    if revision is None:
        raise UserError(
            f"editing.editor: {hub_id} is no folder here, and a model of the hub is loaded by its "
            "commit alone: name that too, 40 hex digits, as editing.revision (on the model's page, "
            "under Files, History), or use 'bundled'."
        )
    try:
        return Path(
            DiffusionPipeline.download(
                hub_id, revision=revision, use_safetensors=True, safety_checker=None
            )
        )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"editing.editor: {hub_id} is neither a folder here nor a model that the hub gives at "
            f"{revision} ({reason}). Check the name, editing.revision and the network, or use "
            "'bundled'."
        ) from None


def _download_lora(lora: str) -> Path:
    from huggingface_hub import hf_hub_download

    named = _HUB_FILE.fullmatch(lora)
    if not named:
        raise UserError(
            f"editing.lora: {lora} is no file here, and one of the hub is loaded by its commit "
            "alone: write owner/name@COMMIT/FILE.safetensors, with 40 hex digits (on the model's "
            "page, under Files, History)."
        )
    try:
        return Path(hf_hub_download(named["repository"], named["file"], revision=named["commit"]))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"editing.lora: {lora} is neither a file here nor one that the hub gives ({reason}). "
            "Check the name, owner/name@COMMIT/FILE.safetensors, and the network."
        ) from None
