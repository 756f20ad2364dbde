"""InstructPix2Pix (Brooks et al. 2023) on Stable Diffusion 1.5 and XL: loading and sampling.

Nothing here knows which checkpoint it holds: the one that the package carries and
timbrooks/instruct-pix2pix go the same way. The loop is that of diffusers' pipelines, with four
differences. Latents and noise are float32 whatever the UNet computes in, so that a seed means the
same noise on every device. Guidance may be left out of the first and of the last steps, where one
branch is left of three (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval"). An
instruction is encoded once, a source once a batch. Both autoencoder passes go in small chunks.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusemix_pipeline.editing.pipelines import (
    compute_dtype,
    fuse_lora,
    numeric_profile,
    silence_libraries,
    to_pixels,
)
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.settings import Editing

# "checkpoint" is none of them: the scheduler that was loaded stays.
SCHEDULERS = {
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
}
_CHUNK = 4
"""Images that the autoencoder takes at once: its activations are the largest of all, and a fixed
shape leaves the bytes of an image to itself."""

_CPU_LATENTS = 32 * 32**2
"""Places of latents that the UNet takes at once on a CPU: what more of them activate leaves the
cache, and three times as many take a tenth longer each."""


class Text(NamedTuple):
    """An instruction as the UNet reads it: float32 (1, tokens, D), and what else it needs."""

    hidden: Tensor
    added: dict[str, Tensor]


class InstructPix2PixEditor:
    """See `Editor`."""

    _pipeline_class: ClassVar[Any] = diffusers.StableDiffusionInstructPix2PixPipeline
    # The safety checker is left out as in the authors' code: it blacks images out, and what it
    # flags on small or stylised pictures is mostly wrong.
    _without: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }

    def __init__(self, folder: Path, editing: Editing, device: str, lora: Path | None) -> None:
        silence_libraries()
        self._editing = editing
        dtype = compute_dtype(editing.dtype, device, half=torch.float16)  # as the authors' code
        self._pipeline = self._pipeline_class.from_pretrained(
            folder,
            dtype={"unet": dtype, "vae": self._vae_dtype(dtype), "default": torch.float32},
            use_safetensors=True,
            local_files_only=True,
            **self._without,
        )
        if lora:
            fuse_lora(self._pipeline, lora)
        self._pipeline.to(device)
        if editing.sampler in SCHEDULERS:
            self._pipeline.scheduler = SCHEDULERS[editing.sampler].from_config(
                self._pipeline.scheduler.config
            )
        self._unet, self._vae = self._pipeline.unet, self._pipeline.vae
        self._unet.to(memory_format=torch.channels_last)
        if device == "cpu":
            _normalise_small_maps_by_channel(self._unet)
        if editing.compile:
            self._unet.compile()
        self._texts: dict[str, Text] = {}

    def profile(self) -> dict[str, Any]:
        """Return what the bytes of an edit depend on beside its key and its batch."""
        layout = {"memory_format": "channels_last"}
        if self._unet.device.type == "cpu":
            layout |= {"small_group_norms": "contiguous", "latents_at_once": str(_CPU_LATENTS)}
        return numeric_profile(self._unet, self._editing) | layout

    def check_instruction(self, instruction: str) -> None:
        """Raise UserError for an instruction that the text encoder would cut off."""
        tokenizer = self._pipeline.tokenizer
        tokens = len(tokenizer(instruction).input_ids)
        if tokens > tokenizer.model_max_length:
            raise UserError(
                f"The instruction '{instruction}' has {tokens} tokens; this editor reads "
                f"{tokenizer.model_max_length}. Shorten the prompt or editing.template."
            )

    @torch.inference_mode()
    def edit(
        self, images: np.ndarray, instructions: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray:
        """Edit uint8 (B, S, S, 3) images, each by its instruction and seed, to the same shape."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = self._sample(
            self._encode_images(images), [self._text(text) for text in instructions], generators
        )
        edited = self._in_chunks(
            lambda part: self._vae.decode(part.to(self._vae.dtype)).sample,
            self._to_decode(latents),
        )
        return to_pixels((edited.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())

    def _sample(
        self, sources: Tensor, texts: Sequence[Text], generators: list[torch.Generator]
    ) -> Tensor:
        """Denoise one latent for each source: float32 (B, C, H, W), as `sources`.

        Guided steps evaluate three branches: text and image, image alone, neither (Brooks et al.
        2023, equation 3); the steps after them the first alone.
        """
        editing, unet = self._editing, self._unet
        # A scheduler counts its steps, and threads share the editor.
        scheduler = copy.deepcopy(self._pipeline.scheduler)
        scheduler.set_timesteps(editing.steps, device=unet.device)
        noise = randn_tensor(sources.shape, generators, unet.device)
        latents = noise * scheduler.init_noise_sigma
        guided = self._branches(sources, texts, 3)
        alone = self._branches(sources, texts, 1)
        # Not every scheduler that a checkpoint may ship draws noise, or has an eta.
        drawn = self._pipeline.prepare_extra_step_kwargs(generators, eta=0.0)
        for step, time in enumerate(scheduler.timesteps):
            branches = guided if step in editing.guided_steps else alone
            scaled = scheduler.scale_model_input(latents, time)
            predicted = self._predict(scaled, time, branches)
            if branches is guided:
                with_text, with_image, without = predicted.chunk(3)
                predicted = (
                    without
                    + editing.guidance * (with_text - with_image)
                    + editing.image_guidance * (with_image - without)
                )
            latents = scheduler.step(predicted, time, latents, **drawn).prev_sample
        return latents

    def _predict(self, latents: Tensor, time: Tensor, branches: "_Branches") -> Tensor:
        times = len(branches.sources) // len(latents)
        joined = torch.cat([latents.repeat(times, 1, 1, 1), branches.sources], dim=1)
        joined = joined.to(self._unet.dtype, memory_format=torch.channels_last)
        at_once = len(joined)
        if joined.device.type == "cpu":
            most = max(1, _CPU_LATENTS // joined[0, 0].numel())
            # In parts of one shape, for that shapes the bytes.
            at_once = max(rows for rows in range(1, most + 1) if len(joined) % rows == 0)
        predicted = [
            self._unet(
                joined[start : start + at_once],
                time,
                encoder_hidden_states=branches.hidden[start : start + at_once],
                added_cond_kwargs={
                    name: added[start : start + at_once] for name, added in branches.added.items()
                },
            ).sample
            for start in range(0, len(joined), at_once)
        ]
        return torch.cat(predicted).float()

    def _branches(self, sources: Tensor, texts: Sequence[Text], branches: int) -> "_Branches":
        empty = self._text("")
        every = [*texts, *([empty] * len(texts) * (branches - 1))]
        added = {name: torch.cat([text.added[name] for text in every]) for name in empty.added}
        return _Branches(
            torch.cat([sources, sources, torch.zeros_like(sources)][:branches]),
            torch.cat([text.hidden for text in every]).to(self._unet.dtype),
            {name: value.to(self._unet.dtype) for name, value in added.items()},
        )

    def _encode_images(self, images: np.ndarray) -> Tensor:
        """Return the unscaled latents of uint8 (B, S, S, 3): float32 (B, C, H, W).

        A source that a batch holds several times is encoded once.
        """
        different, place = np.unique(images, axis=0, return_inverse=True)
        pixels = torch.from_numpy(different).permute(0, 3, 1, 2).to(self._unet.device)
        latents = self._in_chunks(
            lambda part: self._vae.encode(part).latent_dist.mode(),
            (pixels.float() / 127.5 - 1).to(self._vae.dtype),
        )
        return latents.float()[torch.from_numpy(place)]

    def _in_chunks(self, work: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Apply `work` to chunks of one shape, the last one filled up with its first image."""
        done = []
        for part in images.split(_CHUNK):
            filled = torch.cat([part, part[:1].expand(_CHUNK - len(part), *part.shape[1:])])
            # The memory format shapes the bytes too, and `cat` chooses it by what it is given.
            done.append(work(filled.contiguous())[: len(part)])
        return torch.cat(done)

    def _text(self, instruction: str) -> Text:
        """Encode an instruction, once."""
        if instruction not in self._texts:
            self._texts[instruction] = self._encode_text(instruction)
        return self._texts[instruction]

    @torch.inference_mode()
    def _encode_text(self, instruction: str) -> Text:
        tokenizer, encoder = self._pipeline.tokenizer, self._pipeline.text_encoder
        tokens = tokenizer(
            instruction,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self._unet.device)
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if uses_mask else None
        return Text(encoder(tokens.input_ids, attention_mask=mask)[0], {})

    def _to_decode(self, latents: Tensor) -> Tensor:
        return latents / self._vae.config.scaling_factor

    @staticmethod
    def _vae_dtype(dtype: torch.dtype) -> torch.dtype:
        # bfloat16 has fewer bits than a pixel.
        return torch.float32 if dtype == torch.bfloat16 else dtype


class InstructPix2PixXLEditor(InstructPix2PixEditor):
    """InstructPix2Pix on SDXL: two text encoders, and the size among the UNet's conditions."""

    _pipeline_class = diffusers.StableDiffusionXLInstructPix2PixPipeline
    _without: ClassVar[dict[str, Any]] = {"add_watermarker": False}

    @torch.inference_mode()
    def _encode_text(self, instruction: str) -> Text:
        hidden, _, pooled, _ = self._pipeline.encode_prompt(
            instruction, device=self._unet.device, do_classifier_free_guidance=False
        )
        if not instruction and self._pipeline.config.force_zeros_for_empty_prompt:
            hidden, pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
        return Text(hidden, {"text_embeds": pooled})

    def _branches(self, sources: Tensor, texts: Sequence[Text], branches: int) -> "_Branches":
        made = super()._branches(sources, texts, branches)
        side = sources.shape[-1] * self._pipeline.vae_scale_factor
        size = made.hidden.new_tensor([side, side, 0, 0, side, side])  # original, crop, target
        made.added["time_ids"] = size.expand(len(made.hidden), -1)
        return made

    def _to_decode(self, latents: Tensor) -> Tensor:
        config = self._vae.config
        if config.latents_mean is None or config.latents_std is None:
            return super()._to_decode(latents)
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return latents * std / config.scaling_factor + mean

    @staticmethod
    def _vae_dtype(dtype: torch.dtype) -> torch.dtype:
        return torch.float32  # SDXL's autoencoder overflows in half precision


def _normalise_small_maps_by_channel(unet: torch.nn.Module) -> None:
    """Lay maps of fewer than 1,024 px out channel by channel for their group norms alone.

    There, torch reads a channels-last map on a CPU in strides of its channels, once a group: 3 to 4
    times as slow as copying it there and back, for groups of four channels.
    """

    def is_small(maps: Tensor) -> bool:
        return maps.ndim == 4 and maps[0, 0].numel() < 1024

    def by_channel(norm: torch.nn.Module, given: tuple[Tensor]) -> tuple[Tensor] | None:
        return (given[0].contiguous(),) if is_small(given[0]) else None

    def channels_last(norm: torch.nn.Module, given: Any, normed: Tensor) -> Tensor:
        return normed.contiguous(memory_format=torch.channels_last) if is_small(normed) else normed

    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(by_channel)
            module.register_forward_hook(channels_last)


class _Branches(NamedTuple):
    """The UNet's conditions for all branches of a batch, one branch after the other."""

    sources: Tensor
    hidden: Tensor
    added: dict[str, Tensor]
