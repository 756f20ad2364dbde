"""Few-step editors: diffusion transformers that edit in 4 to 8 steps, by diffusers' own pipelines.

Each pipeline is called as it is, for one image at a time: most take no batch of pairs of image and
instruction (`docs/editors.md`). What differs between them is the table at the end.
"""

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusemix_pipeline.datasets.images import to_square
from diffusemix_pipeline.editing.pipelines import (
    compute_dtype,
    fuse_lora,
    numeric_profile,
    silence_libraries,
    to_pixels,
)
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.settings import Editing

_TEMPLATE_TOKENS = 32
"""More than any chat template puts around an instruction within the tokens that are read."""
_LARGEST_SIDE = 1024
"""Px: Qwen-Image-Edit and LongCat scale every source to this, FLUX.2 klein what is larger."""
_SMALLEST_KLEIN_SIDE = 64


class FewStepEditor:
    """See `Editor`. Threads take turns: a run's state lies in pipeline, scheduler and autoencoder.

    `lora` is a safetensors file whose weights are fused into the denoiser's.
    """

    def __init__(self, folder: Path, editing: Editing, device: str, lora: Path | None) -> None:
        silence_libraries()
        self._editing = editing
        family = diffusers.DiffusionPipeline.load_config(folder)["_class_name"]
        self._arguments = _ARGUMENTS[family]
        self._pipeline = getattr(diffusers, family).from_pretrained(
            folder,
            dtype=compute_dtype(editing.dtype, device, half=torch.bfloat16),
            use_safetensors=True,
            local_files_only=True,
        )
        if lora:
            fuse_lora(self._pipeline, lora)
        self._pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        if editing.compile:
            self._pipeline.transformer.compile()
        self._turn = threading.Lock()

    def profile(self) -> dict[str, Any]:
        """Return what the bytes of an edit depend on beside its key and its batch."""
        return numeric_profile(self._pipeline.transformer, self._editing)

    def check_instruction(self, instruction: str) -> None:
        """Raise UserError for an instruction that the text encoder would cut off."""
        tokens = len(self._pipeline.tokenizer(instruction).input_ids)
        limit = self._pipeline.tokenizer_max_length - _TEMPLATE_TOKENS
        if tokens > limit:
            raise UserError(
                f"The instruction '{instruction}' has {tokens} tokens; this editor reads {limit}. "
                "Shorten the prompt or editing.template."
            )

    @torch.inference_mode()
    def edit(
        self, images: np.ndarray, instructions: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray:
        """Edit uint8 (B, S, S, 3) images, each by its instruction and seed, to the same shape.

        The edits of one image do not depend on B. Where the pipeline works at another size than
        S, its result is scaled to S, anti-aliased.
        """
        return np.stack(
            [self._edit_one(*each) for each in zip(images, instructions, seeds, strict=True)]
        )

    def _edit_one(self, image: np.ndarray, instruction: str, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        arguments = self._arguments(
            self._pipeline, Image.fromarray(image), self._editing.guidance, generator
        )
        with self._turn:
            edited = self._pipeline(
                prompt=instruction,
                num_inference_steps=self._editing.steps,
                output_type="np",
                **arguments,
            ).images
        return to_square(Image.fromarray(to_pixels(edited)[0]), len(image))


# What each pipeline is called with beside prompt and steps. `latents` is the initial noise, drawn
# as float32 on the CPU, so that a seed means the same noise in every number format and device.


def _klein(
    pipeline: Any, source: Image.Image, guidance: float, generator: torch.Generator
) -> dict[str, Any]:
    """FLUX.2 klein works at the size of its source: from 64 px to 1024 px, in multiples of 16.

    A side that is no such multiple it would cut. The distilled checkpoints ignore the guidance.
    """
    unit = pipeline.vae_scale_factor * 2
    wanted = max(_SMALLEST_KLEIN_SIDE, math.ceil(source.width / unit) * unit)
    side = min(_LARGEST_SIDE, wanted)
    channels, tokens = pipeline.transformer.config.in_channels, side // unit
    return {
        "image": source.resize((side, side), Image.Resampling.LANCZOS),
        "latents": torch.randn(1, channels, tokens, tokens, generator=generator),
        "guidance_scale": guidance,
    }


def _qwen(
    pipeline: Any, source: Image.Image, guidance: float, generator: torch.Generator
) -> dict[str, Any]:
    """Qwen-Image-Edit works at 1024 px; guided, it evaluates an empty prompt, a space, beside."""
    return {
        "image": source,
        "latents": _packed_noise(pipeline, generator),
        "true_cfg_scale": guidance,
        "negative_prompt": " " if guidance > 1 else None,
    }


def _longcat(
    pipeline: Any, source: Image.Image, guidance: float, generator: torch.Generator
) -> dict[str, Any]:
    """LongCat-Image-Edit works at 1024 px."""
    return {
        "image": source,
        "latents": _packed_noise(pipeline, generator),
        "guidance_scale": guidance,
    }


def _packed_noise(pipeline: Any, generator: torch.Generator) -> Tensor:
    """Draw the noise of a 1024 px image as the transformer reads it: float32 (1, tokens, C)."""
    tokens = (_LARGEST_SIDE // (pipeline.vae_scale_factor * 2)) ** 2
    return torch.randn(1, tokens, pipeline.transformer.config.in_channels, generator=generator)


_ARGUMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "Flux2KleinPipeline": _klein,
    "QwenImageEditPipeline": _qwen,
    "QwenImageEditPlusPipeline": _qwen,
    "LongCatImageEditPipeline": _longcat,
}
