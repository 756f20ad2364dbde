"""Everything that can be known to be wrong before any work is done, each with one message."""

from pathlib import Path

from diffusemix_pipeline.datasets.sources import DIGITS
from diffusemix_pipeline.devices import choose_device
from diffusemix_pipeline.editing.editor import locate_editor
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.mixing.fractals import fractals_version
from diffusemix_pipeline.settings import Settings


def check_run(settings: Settings) -> None:
    """Raise UserError for what would end a whole run after hours of work."""
    from diffusemix_pipeline.training.classifier import check_model

    source = settings.source.path
    if source not in ("", DIGITS) and not Path(source).expanduser().is_dir():
        raise UserError(f"source.path: the folder {source} does not exist.")
    check_model(settings.training.model, settings.size, settings.training.pretrained)
    check_augmentation(settings)


def check_augmentation(settings: Settings) -> None:
    """Raise UserError for an editor, a device or a fractal folder that is not there."""
    import torch

    mixing = settings.mixing
    fractals_version(mixing, settings.seed)
    if mixing.seam > settings.size:
        raise UserError(f"mixing.seam: {mixing.seam} px is wider than size, {settings.size} px.")
    try:
        torch.empty(0, device=choose_device(settings.device))
    except (RuntimeError, AssertionError):
        raise UserError(f"device: {settings.device} is not here. Use auto or cpu.") from None
    locate_editor(settings.editing.editor, settings.editing.revision)
