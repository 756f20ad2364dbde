"""The editor: an InstructPix2Pix pipeline (Brooks et al. 2023) in diffusers' format, hub or folder.

Nothing here knows which checkpoint it holds: the one that the package carries and
timbrooks/instruct-pix2pix go the same way.
"""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import digest, file_sha256
from diffusemix_pipeline.settings import Editing

if TYPE_CHECKING:
    from diffusers import StableDiffusionInstructPix2PixPipeline

BUNDLED = "bundled"
BUNDLED_WEIGHTS = Path(__file__).parent.parent / "bundled_editor" / "weights"
INDEX = "model_index.json"
_CLASS_NAME = "StableDiffusionInstructPix2PixPipeline"


def locate_editor(editor: str, revision: str | None) -> Path:
    """Return the folder that holds an editor's files, downloading a hub id's safetensors once.

    Raises UserError where the folder holds another pipeline or the hub cannot give it.
    """
    if editor == BUNDLED:
        return BUNDLED_WEIGHTS
    folder = Path(editor).expanduser()
    if not folder.is_dir():
        folder = _download(editor, revision)
    index = folder / INDEX
    try:
        parts = dict(json.loads(index.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        parts = {}
    found = parts.get("_class_name")
    if found != _CLASS_NAME:
        raise UserError(
            f"editing.editor: {editor} holds {found or 'no readable model_index.json'}, "
            f"but a {_CLASS_NAME} in diffusers' format is needed."
        )
    for model in ("unet", "vae", "text_encoder"):
        if not any((folder / model).glob("*.safetensors")):
            raise UserError(
                f"editing.editor: {editor} holds no {model}/*.safetensors. Other formats are not "
                "read, as they may run code: convert it, or have it downloaded again."
            )
    return folder


def editor_fingerprint(folder: Path) -> str:
    """Identify an editor's weights: a hub snapshot by its commit, a folder by its files' bytes."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return digest("hub", folder.parent.parent.name, folder.name)
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".txt"))
    return digest([[p.relative_to(folder).as_posix(), file_sha256(p)] for p in files])


class InstructPix2PixEditor:
    """An editor on a device: `edit(images, instructions, seeds) -> images`."""

    def __init__(self, folder: Path, editing: Editing, device: str) -> None:
        import torch

        self._editing = editing
        self._torch = torch
        # fp16 as the authors' code where there is an accelerator; CPUs are exact and fast in fp32.
        dtype = torch.float32 if device == "cpu" else torch.float16
        self._pipeline = _load_pipeline(folder, editing.sampler, dtype).to(device)

    def profile(self) -> dict[str, Any]:
        """Return what the bytes of an edit depend on beside its key (DESIGN, promise 2)."""
        import diffusers

        torch, unet = self._torch, self._pipeline.unet
        on_gpu = unet.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(unet.device) if on_gpu else platform.machine(),
            "dtype": str(unet.dtype).removeprefix("torch."),
            "batch_size": self._editing.batch_size,
            "threads": None if on_gpu else torch.get_num_threads(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }

    def check_instruction(self, instruction: str) -> None:
        """Raise UserError for an instruction that the text encoder would cut off."""
        tokenizer = self._pipeline.tokenizer
        tokens = len(tokenizer(instruction).input_ids)
        if tokens > tokenizer.model_max_length:
            raise UserError(
                f"The instruction '{instruction}' has {tokens} tokens; this editor reads "
                f"{tokenizer.model_max_length}. Shorten the prompt or editing.template."
            )

    def edit(
        self, images: np.ndarray, instructions: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray:
        """Edit uint8 (B, S, S, 3) images, each by its instruction and seed; B <= batch_size.

        The batch is padded to its full size, because the shape of a batch changes the bytes of its
        members while their order and neighbours do not.
        """
        given = len(images)
        padded = [min(index, given - 1) for index in range(self._editing.batch_size)]
        generators = [self._torch.Generator("cpu").manual_seed(seeds[i]) for i in padded]
        pixels = self._torch.from_numpy(images[padded]).permute(0, 3, 1, 2).float() / 255
        edited = self._pipeline(
            prompt=[instructions[i] for i in padded],
            image=pixels,
            generator=generators,
            num_inference_steps=self._editing.steps,
            guidance_scale=self._editing.guidance,
            image_guidance_scale=self._editing.image_guidance,
            output_type="np",
        ).images[:given]
        failed = int((~np.isfinite(edited)).any(axis=(1, 2, 3)).sum())
        if failed:  # cast to integers, they would be black images with a label
            raise UserError(
                f"The editor gave no numbers for {failed} of {given} edits, as half precision does "
                "where it overflows. Try other guidance scales, another checkpoint, or device=cpu."
            )
        return (edited * 255).round().astype(np.uint8)


def _load_pipeline(
    folder: Path, sampler: str, dtype: Any
) -> "StableDiffusionInstructPix2PixPipeline":
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # our own progress is what a person watches
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    schedulers = {
        "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
        "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    }
    # The safety checker is left out as in the authors' code: it blacks images out, and what it
    # flags on small or stylised pictures is mostly wrong.
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        local_files_only=True,
    )
    pipeline.scheduler = schedulers[sampler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
