"""An editor without a model: each prompt names a filter of Pillow's. A control for any other."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageFilter, ImageOps

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.settings import Editing

FILTERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "emboss": lambda picture: picture.filter(ImageFilter.EMBOSS),
    "contour": lambda picture: picture.filter(ImageFilter.CONTOUR),
    "posterize": lambda picture: ImageOps.posterize(picture, 2),
    "solarize": ImageOps.solarize,
}


class Editor:
    def __init__(self, editing: Editing, device: str) -> None:
        """Load weights here, if there are any."""

    def check_instruction(self, instruction: str) -> None:
        if instruction not in FILTERS:
            raise UserError(f"editing.prompts: {instruction} is none of {', '.join(FILTERS)}.")

    def edit(
        self, images: np.ndarray, instructions: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray:
        pictures = map(Image.fromarray, images)
        return np.stack([FILTERS[of](p) for of, p in zip(instructions, pictures, strict=True)])

    def profile(self) -> dict[str, Any]:
        return {"pillow": PIL.__version__}
