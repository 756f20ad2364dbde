"""Few-step editors of diffusers' real classes, of tiny size, with random weights and vocabularies.

Their autoencoders shrink 1024 px more than the real ones do, so that there are few tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def tiny_klein(folder: Path, distilled: bool = True) -> Path:
    """Save a FLUX.2 klein, distilled as the released one is."""
    torch.manual_seed(0)
    tokenizer = _byte_tokenizer()
    pipeline = diffusers.Flux2KleinPipeline(
        scheduler=_scheduler(),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=1,
            latent_channels=1,
            sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=27,  # the pipeline reads layers 9, 18 and 27
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                vocab_size=len(tokenizer),
            )
        ),
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        is_distilled=distilled,
    )
    return _save(pipeline, folder)


def tiny_qwen(folder: Path) -> Path:
    """Save a Qwen-Image-Edit."""
    return _tiny_qwen(diffusers.QwenImageEditPipeline, folder)


def tiny_qwen_plus(folder: Path) -> Path:
    """Save a Qwen-Image-Edit-2509."""
    return _tiny_qwen(diffusers.QwenImageEditPlusPipeline, folder)


def tiny_longcat(folder: Path) -> Path:
    """Save a LongCat-Image-Edit."""
    torch.manual_seed(0)
    processor = _vision_processor()
    pipeline = diffusers.LongCatImageEditPipeline(
        scheduler=_scheduler(),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(4,) * 6,
            layers_per_block=1,
            norm_num_groups=1,
            latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 6,
            up_block_types=("UpDecoderBlock2D",) * 6,
            shift_factor=0.1,
            scaling_factor=0.4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=_vision_language_model(processor.tokenizer),
        tokenizer=processor.tokenizer,
        text_processor=processor,
        transformer=diffusers.LongCatImageTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 4, 8],
        ),
    )
    return _save(pipeline, folder)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "Flux2KleinPipeline": tiny_klein,
    "QwenImageEditPipeline": tiny_qwen,
    "QwenImageEditPlusPipeline": tiny_qwen_plus,
    "LongCatImageEditPipeline": tiny_longcat,
}


def tiny_lora(editor: Path, file: Path, seed: int = 0) -> Path:
    """Train nothing, but save low-rank weights for an editor's attention as diffusers does."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = diffusers.DiffusionPipeline.from_pretrained(editor)
    torch.manual_seed(seed)
    name = "transformer" if hasattr(pipeline, "transformer") else "unet"
    denoiser = getattr(pipeline, name)
    denoiser.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
    )
    weights = get_peft_model_state_dict(denoiser)
    for key in weights:  # peft starts from no effect
        weights[key] = torch.randn_like(weights[key])
    type(pipeline).save_lora_weights(
        file.parent, **{f"{name}_lora_layers": weights}, weight_name=file.name
    )
    return file


def _tiny_qwen(pipeline_class: type[Any], folder: Path) -> Path:
    torch.manual_seed(0)
    processor = _vision_processor()
    levels = 5
    pipeline = pipeline_class(
        scheduler=_scheduler(),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=2,
            z_dim=4,
            dim_mult=[1] * (levels + 1),
            num_res_blocks=0,
            temperal_downsample=[False] * levels,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=_vision_language_model(processor.tokenizer),
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=False,
        ),
    )
    return _save(pipeline, folder)


def _save(pipeline: Any, folder: Path) -> Path:
    """Save with weights so large that prompt and source reach the pixels, as in no fresh model."""
    for denoiser_or_autoencoder in (pipeline.transformer, pipeline.vae):
        for parameter in denoiser_or_autoencoder.parameters():
            if parameter.ndim > 1:
                parameter.data *= 2
    pipeline.save_pretrained(folder)
    return folder


def _scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def _byte_tokenizer() -> Qwen2Tokenizer:
    """Return a Qwen tokenizer that knows bytes alone."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = [*bytes_to_unicode().values(), *SPECIAL, *VISION]
    tokenizer = Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        additional_special_tokens=[*SPECIAL[1:], *VISION],
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def _vision_processor() -> transformers.Qwen2VLProcessor:
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 56
        ),
        tokenizer=_byte_tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=_CHAT,
    )


def _vision_language_model(tokenizer: Qwen2Tokenizer) -> Any:
    number = tokenizer.convert_tokens_to_ids
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": len(tokenizer),
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"},
                "rope_theta": 1e6,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
            },
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
            image_token_id=number("<|image_pad|>"),
            video_token_id=number("<|video_pad|>"),
        )
    )
