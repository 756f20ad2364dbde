"""What every editor asks of a pipeline of diffusers: number format, LoRA, pixels, numeric profile.

What belongs here: whatever two families share once a pipeline is loaded. What does not: finding an
editor's files (`editor.py`), and how a family samples (a module each).
"""

import platform
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL
import torch
import transformers

from diffusemix_pipeline.devices import is_fast_at_bfloat16
from diffusemix_pipeline.errors import UserError, first_line
from diffusemix_pipeline.settings import Editing


def silence_libraries() -> None:
    """Leave the terminal to our own progress, which is what a person watches."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def compute_dtype(wanted: str, device: str, half: torch.dtype) -> torch.dtype:
    """Resolve 'auto': `half` on accelerators, bfloat16 on CPUs fast at it, else float32."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device != "cpu":
        return half
    return torch.bfloat16 if is_fast_at_bfloat16(device) else torch.float32


def fuse_lora(pipeline: Any, lora: Path) -> None:
    """Add the low-rank weights of a safetensors file to those of the pipeline, for good.

    Raises UserError for a file that fits no part of the pipeline: diffusers only logs that.
    """
    try:
        pipeline.load_lora_weights(
            lora.parent, weight_name=lora.name, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # a converter for each trainer's keys, each with errors of its own
        raise _unfit(pipeline, lora, f" ({first_line(error)})") from error
    if not pipeline.get_list_adapters():
        raise _unfit(pipeline, lora, "")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()  # fused weights stay; the layers beside them would cost time


def to_pixels(edited: np.ndarray) -> np.ndarray:
    """Turn floats (B, H, W, 3) in [0, 1] into uint8; UserError where any is no number."""
    failed = int((~np.isfinite(edited)).any(axis=(1, 2, 3)).sum())
    if failed:  # cast to integers, they would be black images with a label
        raise UserError(
            f"The editor gave no numbers for {failed} of {len(edited)} edits, as half "
            "precision does where it overflows. Try editing.dtype=float32, other guidance "
            "scales or another checkpoint."
        )
    return (edited * 255).round().astype(np.uint8)


def numeric_profile(denoiser: torch.nn.Module, editing: Editing) -> dict[str, Any]:
    """Return what the bytes of an edit depend on beside its key and its batch."""
    weights = next(denoiser.parameters())
    device = weights.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(device),
        "dtype": str(weights.dtype).removeprefix("torch."),
        "compile": editing.compile,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
    }


def _cpu(device: torch.device) -> str:
    """Name a device that has no name of its own by what its arithmetic depends on."""
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _unfit(pipeline: Any, lora: Path, reason: str) -> UserError:
    return UserError(
        f"editing.lora: {lora} fits no part of {type(pipeline).__name__}{reason}. "
        "Name one that was trained for this editor."
    )
