"""How the bundled editor is trained: the UNet with its text encoder, on a fixed autoencoder.

What belongs here: building the five parts of the pipeline, the training loop, saving. What
does not: the edits to learn (`teachers`), the pictures (`sources`), the figures (`evaluation`).

Every random number of a step follows from (seed, stage, step), so a run that is killed goes on
from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusemix_pipeline.bundled_editor.sources import SourceBank
from diffusemix_pipeline.bundled_editor.teachers import PROMPTS, apply_teachers
from diffusemix_pipeline.devices import is_fast_at_bfloat16
from diffusemix_pipeline.editing.editor import INDEX as EDITOR_INDEX
from diffusemix_pipeline.files import check_replaceable, replaced_folder, write_bytes
from diffusemix_pipeline.identity import digest, seed_from
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.settings import Editing

TEMPLATE = Editing().template


@dataclass(frozen=True)
class EditorRecipe:
    """How long and how wide to train. The defaults are the shipped weights' recipe.

    A batch holds `small_batch` images of 32 px, or, in every second step, `large_batch` of 64 px.
    """

    steps: int = 7500
    rate: float = 6e-4
    small_batch: int = 24
    large_batch: int = 8
    made_pictures: int = 3000
    channels: tuple[int, int, int, int] = (32, 64, 96, 128)
    save_every: int = 250


def train_editor(
    out: Path,
    *,
    image_folders: Sequence[Path] = (),
    checkpoint_dir: Path,
    seed: int = 0,
    recipe: EditorRecipe = EditorRecipe(),
    progress: Progress = silent,
) -> Path:
    """Train an editor from nothing and save it as a diffusers pipeline folder; return the folder.

    `image_folders` are folders of class folders of photographs, which are only read; the digits
    and the pictures that the project makes itself are always among the sources. A killed run of
    the same seed, recipe and images goes on from its checkpoint below `checkpoint_dir`. Raises
    UserError where `out` holds something else than an editor.
    """
    check_replaceable(out, EDITOR_INDEX)
    bank = SourceBank(image_folders, made_pictures=recipe.made_pictures, seed=seed)
    checkpoint = checkpoint_dir / digest(seed, asdict(recipe), bank.digest()) / "editor.pt"
    autoencoder = build_autoencoder()
    text_encoder, unet = _train_unet(autoencoder, bank, recipe, seed, checkpoint, progress)
    _save_pipeline(out, autoencoder, text_encoder, unet)
    return out


# Autoencoder


def build_autoencoder() -> AutoencoderKL:
    """An autoencoder set by hand: its latents are luminance and two colour differences.

    It has one level, so latents are as large as the image, and as many. At 32 px nothing is gained
    by compressing, and much is lost: trained ones of two levels and six channels lost detail below
    26 dB on sharp photographs, and so the edits made through them.
    """
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=1,
        sample_size=32,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    luma = torch.tensor([0.299, 0.587, 0.114])
    red, _, blue = torch.eye(3)
    # Luminance and colour differences of photographs in [-1, 1] deviate by about 0.5 and 0.3.
    to_latents = torch.stack([luma / 0.5, (blue - luma) / 0.3, (red - luma) / 0.3])
    with torch.no_grad():
        _set_linear(autoencoder.encoder, to_latents)
        _set_linear(autoencoder.decoder, to_latents.inverse())
        for one_to_one in (autoencoder.quant_conv, autoencoder.post_quant_conv):
            one_to_one.weight.copy_(torch.eye(len(one_to_one.weight))[..., None, None])
            one_to_one.bias.zero_()
        autoencoder.quant_conv.bias[3:] = -20  # log variance: the latents are certain
    return autoencoder.eval().requires_grad_(False)


def _set_linear(half: Any, matrix: Tensor) -> None:
    """Make an encoder or decoder multiply the three channels of every pixel by `matrix`.

    Residual blocks add nothing. Each value goes in with both signs, since silu(x) - silu(-x) = x,
    next to two constants so large that the group norm divides by what they say alone.
    """
    constant = 64.0
    for layer in half.modules():
        if isinstance(layer, nn.Conv2d):
            for parameter in layer.parameters():
                parameter.zero_()
    half.conv_in.weight[0:3, :, 1, 1] = torch.eye(3)
    half.conv_in.weight[3:6, :, 1, 1] = -torch.eye(3)
    half.conv_in.bias[6], half.conv_in.bias[7] = constant, -constant
    divisor = constant * (2 / 8) ** 0.5
    half.conv_out.weight[0:3, 0:3, 1, 1] = divisor * matrix
    half.conv_out.weight[0:3, 3:6, 1, 1] = -divisor * matrix


# UNet and text encoder


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose words are those of the template and the prompts.

    Any other text falls back to characters (bytes, where they are not ASCII). The vocabulary is
    those characters, inside and at the end of a word, and what the merges of known words pass.
    """
    characters = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    text = TEMPLATE.format(prompt=" ".join(PROMPTS)).lower().replace("-", " ")
    for word in text.split():
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            known = [pair for pair in merges if pair in pairs]
            # Older merges go first, as the tokenizer has it, so none that follows undoes a word.
            if not known:
                merges.append(pairs[0])
            place = pairs.index(known[0]) if known else 0
            pieces[place : place + 2] = ["".join(pairs[place])]
    tokens = characters + [character + "</w>" for character in characters]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _build_unet(channels: tuple[int, int, int, int], latent_channels: int) -> UNet2DConditionModel:
    """Noisy latents and image latents in, velocity out; attention on the lowest of four levels.

    That level has 8 x 8 places for an image of 64 px, so a place sees all of the image and knows
    where in it it is: arcs, horizons and borders have their place. The pooled text is added to the
    time embedding too, which scales and shifts every block: the prompts edit the whole image, and
    are learnt many times faster so than through attention alone.
    """
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=64,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _build_scheduler() -> DPMSolverMultistepScheduler:
    """v-prediction, and no signal left at the last step.

    Were any left, the network would read a small image's mean colour from it in training and miss
    it when it starts from pure noise.
    """
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def _train_unet(
    autoencoder: AutoencoderKL,
    bank: SourceBank,
    recipe: EditorRecipe,
    seed: int,
    checkpoint: Path,
    progress: Progress,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Learn to draw teacher edits, given the original's latents and the prompt.

    The prompt stands in the template for three quarters of the samples and bare for the rest. It
    is left out of a tenth, and the image of half of those, so that both guidance scales work: the
    pipeline asks for no image only where there is no text (Brooks et al. 2023, eq. 3).
    """
    torch.manual_seed(seed_from(seed, "unet"))
    tokenizer = build_tokenizer()
    text_encoder = _build_text_encoder(tokenizer).train()
    unet = _build_unet(recipe.channels, autoencoder.config.latent_channels)
    unet = unet.to(memory_format=torch.channels_last)
    texts = [*(TEMPLATE.format(prompt=prompt) for prompt in PROMPTS), *PROMPTS, ""]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    signal = _build_scheduler().alphas_cumprod
    _train(
        nn.ModuleList([text_encoder, unet]),
        partial(_velocity_loss, autoencoder, bank, recipe, tokens, signal, seed),
        steps=recipe.steps,
        rate=recipe.rate,
        checkpoint=checkpoint,
        save_every=recipe.save_every,
        progress=progress,
    )
    return text_encoder.eval(), unet.eval()


def _velocity_loss(
    autoencoder: AutoencoderKL,
    bank: SourceBank,
    recipe: EditorRecipe,
    tokens: Tensor,
    signal: Tensor,
    seed: int,
    model: nn.Module,
    step: int,
    part: int,
) -> Tensor:
    """Return the mean squared error of text encoder and UNet (`model`) on a part of a step's batch.

    tokens: [2 * prompts + 1, 77], of each prompt in the template, of each bare, of no text.
    signal: [T] in [0, 1], the share of the signal's variance that is left at each time.
    """
    text_encoder, unet = model.children()
    generator = _generator(seed, "unet", step, part)
    originals, edited, prompts = _draw_pairs(bank, recipe, step, generator)
    count = len(originals)
    text_rows = prompts + len(PROMPTS) * _chance(0.25, count, generator)
    no_text = _chance(0.1, count, generator)
    no_image = no_text & _chance(0.5, count, generator)
    text_rows[no_text] = len(tokens) - 1
    times = torch.randint(len(signal), (count,), generator=generator)
    keep, add = (level[times].view(-1, 1, 1, 1) for level in (signal.sqrt(), (1 - signal).sqrt()))
    with torch.autocast("cpu", torch.bfloat16, enabled=is_fast_at_bfloat16("cpu")):
        with torch.no_grad():
            both = torch.cat([originals, edited]) * 2 - 1
            latents = autoencoder.encode(both).latent_dist.mean.float()
        condition, target = latents.chunk(2)
        condition[no_image] = 0
        noise = torch.randn(target.shape, generator=generator)
        noisy = torch.cat([keep * target + add * noise, condition], 1)
        embeddings = text_encoder(tokens).last_hidden_state[text_rows]
        velocity = unet(
            noisy.contiguous(memory_format=torch.channels_last), times, embeddings
        ).sample
    return nn.functional.mse_loss(velocity.float(), keep * noise - add * target)


# Batches and steps


def _draw_pairs(
    bank: SourceBank, recipe: EditorRecipe, step: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Half a batch: originals and their edits [N, 3, S, S] in [0, 1], prompts' numbers [N]."""
    large = step % 2 == 1
    count = (recipe.large_batch if large else recipe.small_batch) // 2
    originals = _shift_colours(bank.draw(count, 64 if large else 32, generator), generator)
    prompts = torch.randint(len(PROMPTS), (count,), generator=generator)
    edited = apply_teachers(originals, [PROMPTS[number] for number in prompts], generator)
    return originals, edited, prompts


def _shift_colours(images: Tensor, generator: torch.Generator) -> Tensor:
    """Scale and move the colour channels of a third of the images, and mirror half of them."""
    count = len(images)
    changed = _chance(1 / 3, count, generator).view(-1, 1, 1, 1)
    gain = 1 + changed * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5)
    shift = changed * 0.3 * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5)
    mirrored = _chance(0.5, count, generator).view(-1, 1, 1, 1)
    return torch.where(mirrored, images.flip(-1), images).mul(gain).add(shift).clamp(0, 1)


def _chance(probability: float, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < probability


def _generator(seed: int, stage: str, step: int, part: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_from(seed, stage, step, part))


def _train(
    model: nn.Module,
    loss: Callable[[nn.Module, int, int], Tensor],
    *,
    steps: int,
    rate: float,
    checkpoint: Path,
    save_every: int,
    progress: Progress,
) -> None:
    """Minimise `loss(model, step, part)`, then load the moving average of the weights into `model`.

    Every step averages two parts, each worked on by a thread of its own on a replica that shares
    the weights and has its own gradients: on two cores that others use too, this is several times
    as fast as splitting every single operation in two.
    """
    average = copy.deepcopy(model)
    replica = copy.deepcopy(model)
    for shared, its_own in zip(replica.parameters(), model.parameters(), strict=True):
        shared.data = its_own.data
    optimiser, schedule = _optimiser_and_schedule(model, steps, rate)
    parts: dict[str, Any] = {"model": model, "average": average}
    parts |= {"optimiser": optimiser, "schedule": schedule}
    start = _resumed(checkpoint, parts)
    with _one_thread_an_operation(), ThreadPoolExecutor(2) as threads:
        for step in range(start, steps):
            value = sum(threads.map(partial(_backward, loss, step), (model, replica), (0, 1)))
            for summed, other in zip(model.parameters(), replica.parameters(), strict=True):
                if summed.grad is not None and other.grad is not None:
                    summed.grad += other.grad
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            _follow(average, model, decay=min(0.999, (step + 1) / (step + 10)))
            done = step + 1
            progress(f"training the editor, loss {value:.4f}", done, steps)
            if done % save_every == 0 or done == steps:
                state = {key: part.state_dict() for key, part in parts.items()}
                _save_checkpoint(checkpoint, {**state, "step": done})
    model.load_state_dict(average.state_dict())


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _optimiser_and_schedule(
    model: nn.Module, steps: int, rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, whose rate rises linearly for up to 200 steps and then falls so to zero."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    warm_up = min(200, steps // 5 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm_up, 1 - (step - warm_up) / (steps - warm_up + 1)),
    )
    return optimiser, schedule


def _resumed(checkpoint: Path, parts: Mapping[str, Any]) -> int:
    """Bring the parts of a training back to a checkpoint, if there is one; return its step."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    for key, part in parts.items():
        part.load_state_dict(state[key])
    return int(state["step"])


def _backward(
    loss: Callable[[nn.Module, int, int], Tensor], step: int, model: nn.Module, part: int
) -> float:
    """Give a replica the gradients of one of a step's two parts; return its share of the loss."""
    model.zero_grad()
    value = loss(model, step, part) / 2
    value.backward()
    return value.item()


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def _save_checkpoint(path: Path, state: dict[str, object]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def _save_pipeline(
    out: Path,
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
) -> None:
    """Write the pipeline folder in half precision, as a whole or not at all."""
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=copy.deepcopy(autoencoder).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=build_tokenizer(),
        unet=copy.deepcopy(unet).half(),
        scheduler=_build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with replaced_folder(out, mark=EDITOR_INDEX, aside=out.parent) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
