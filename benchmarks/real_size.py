"""How fast an InstructPix2Pix of the real size is, and how near the device's peak: random weights.

    python -m benchmarks.real_size [--sizes 256 512] [--batch-size 8] [--steps 20] [--device cuda]
    python -m benchmarks.real_size --editor bundled --sizes 64

Speed does not depend on what the weights say. On a CPU, it is that of all cores at one batch, where
a run has a batch on each. The peak is what a product of large square matrices
reaches on the device in the same number format; floating-point operations are counted by torch.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusemix_pipeline.devices import choose_device
from diffusemix_pipeline.editing.editor import load_editor, locate_editor
from diffusemix_pipeline.editing.instruct_pix2pix import InstructPix2PixEditor
from diffusemix_pipeline.settings import PAPER_PROMPTS, Editing

MATRIX = {"cuda": 8192, "mps": 4096, "cpu": 2048}


def main() -> None:
    """Print a line of JSON for each size, with and without `torch.compile`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="px")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="timed, all of them guided")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--editor", help="a folder (default: the real size)")
    options = parser.parse_args()
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        named = options.editor
        weights = locate_editor(named, None) if named else write_editor(Path(folder))
        for size in options.sizes:
            for compiled in (False, True):
                editing = Editing(
                    sampler="euler_ancestral",
                    steps=options.steps,
                    compile=compiled,
                    batch_size=options.batch_size,
                )
                print(json.dumps(measure(weights, editing, size, device)), flush=True)


def write_editor(folder: Path) -> Path:
    """Save random weights in the sizes of timbrooks/instruct-pix2pix, about 4 GB of them."""
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    StableDiffusionInstructPix2PixPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
            )
        ),
        tokenizer=CLIPTokenizer.from_pretrained(locate_editor("bundled", None) / "tokenizer"),
        unet=UNet2DConditionModel(
            sample_size=64, in_channels=8, out_channels=4, cross_attention_dim=768
        ),
        scheduler=EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def measure(weights: Path, editing: Editing, size: int, device: str) -> dict[str, Any]:
    """Time one batch of edits after a first, untimed one."""
    editor = load_editor(weights, editing, device)
    assert isinstance(editor, InstructPix2PixEditor)
    count = editing.batch_size
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    instructions = [f"into {PAPER_PROMPTS[n % len(PAPER_PROMPTS)]}" for n in range(count)]

    def batch() -> None:
        editor.edit(images, instructions, range(count))

    evaluations = count * editing.unet_evaluations
    flops = evaluations * _flops_of_an_evaluation(editor, batch)
    seconds = _seconds(batch)
    reached = flops / seconds
    dtype = next(editor._unet.parameters()).dtype
    return {
        "size": size,
        "batch_size": count,
        "compile": editing.compile,
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "unet_evaluations_per_second": evaluations / seconds,
        "edits_per_second_paper": evaluations / seconds / 300,
        "edits_per_second_balanced": evaluations / seconds / 20,
        "tflops": reached / 1e12,
        "fraction_of_peak": reached / _peak(device, dtype),
    }


def _flops_of_an_evaluation(editor: InstructPix2PixEditor, batch: Callable[[], None]) -> float:
    """Count the UNet's operations, an image and branch, in what `batch` gives it."""
    from torch.utils.flop_counter import FlopCounterMode

    given: list[tuple[Any, Any]] = []
    unet = editor._unet
    hook = unet.register_forward_pre_hook(
        lambda _, arguments, named: given.append((arguments, named)), with_kwargs=True
    )
    batch()  # untimed, as the first of anything is slower
    hook.remove()
    arguments, named = given[0]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        unet.forward(*arguments, **named)
    return float(counter.get_total_flops()) / len(arguments[0])


def _peak(device: str, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a product of large matrices."""
    side = MATRIX[device]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def products() -> None:
        for _ in range(10):
            left @ right

    products()
    return 10 * 2 * side**3 / _seconds(products)


def _seconds(work: Callable[[], None]) -> float:
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
