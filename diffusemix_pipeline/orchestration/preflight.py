"""Everything that can be known to be wrong before any work is done, each with one message."""

from pathlib import Path

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.settings import Settings


def preflight(settings: Settings) -> None:
    """Raise UserError for a folder, editor, model or device that would end the run later."""
    import torch

    from diffusemix_pipeline.editing.editor import locate_editor
    from diffusemix_pipeline.training.classifier import check_model_name

    for key, path in (
        ("source.path", settings.source.path),
        ("mixing.fractal_dir", settings.mixing.fractal_dir),
    ):
        if path and path != "digits" and not Path(path).expanduser().is_dir():
            raise UserError(f"{key}: the folder {path} does not exist.")
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device: {settings.device} is not here. Use auto or cpu.")
    if settings.mixing.seam > settings.size:
        raise UserError(
            f"mixing.seam: {settings.mixing.seam} px is wider than size, {settings.size} px."
        )
    check_model_name(settings.training.model)
    locate_editor(settings.editing.editor, settings.editing.revision)
