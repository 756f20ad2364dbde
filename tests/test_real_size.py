"""Promise: the product's loader is the real checkpoint's loader."""

import numpy as np
import pytest
import torch
from conftest import _character_tokenizer, picture, quick_settings

from diffusemix_pipeline.datasets.images import to_square
from diffusemix_pipeline.editing.editor import load_editor, locate_editor


@pytest.mark.slow
def test_a_pipeline_of_the_real_configuration_loads_and_edits(tmp_path):
    """The sizes of timbrooks/instruct-pix2pix, random weights: about 4 GB of them."""
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("cpu"), torch.no_grad():
        unet = UNet2DConditionModel(
            sample_size=64, in_channels=8, out_channels=4, cross_attention_dim=768
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
            )
        )
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(859.5e6, rel=1e-3)
    StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_character_tokenizer(),
        unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path)
    del unet, vae, text_encoder

    settings = quick_settings(
        "size=256",
        "editing.steps=2",
        "editing.batch_size=1",
        "editing.sampler=euler_ancestral",
        "editing.guidance=4",
        "editing.image_guidance=1.5",
    )
    editor = load_editor(locate_editor(str(tmp_path), None), settings.editing, "cpu")
    image = to_square(picture(0, (300, 260)), 256)
    edit = editor.edit(image[None], ["A transformed version of image into sunset"], [0])
    assert edit.shape == (1, 256, 256, 3)
    assert edit.dtype == np.uint8
    assert edit.std() > 0
