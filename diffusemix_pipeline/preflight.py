"""Everything that can be known to be wrong before any work is done, each with one message."""

from pathlib import Path

from diffusemix_pipeline.datasets.sources import DIGITS
from diffusemix_pipeline.editing.editor import locate_editor
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.settings import Settings


def check_run(settings: Settings) -> None:
    """Raise UserError for what would end a whole run after hours of work."""
    from diffusemix_pipeline.training.classifier import check_model_name

    source = settings.source.path
    if source not in ("", DIGITS):
        _check_folder("source.path", source)
    check_model_name(settings.training.model)
    check_augmentation(settings)


def check_augmentation(settings: Settings) -> None:
    """Raise UserError for an editor, a device or a fractal folder that is not there."""
    import torch

    mixing = settings.mixing
    if mixing.fractal_dir:
        _check_folder("mixing.fractal_dir", mixing.fractal_dir)
    if mixing.seam > settings.size:
        raise UserError(f"mixing.seam: {mixing.seam} px is wider than size, {settings.size} px.")
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device: {settings.device} is not here. Use auto or cpu.")
    locate_editor(settings.editing.editor, settings.editing.revision)


def _check_folder(key: str, path: str) -> None:
    if not Path(path).expanduser().is_dir():
        raise UserError(f"{key}: the folder {path} does not exist.")
