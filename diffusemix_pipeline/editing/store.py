"""The edit store: every edit that was ever paid for, by what determines it, outside of `data/`."""

from pathlib import Path

import numpy as np

from diffusemix_pipeline.datasets.images import png_bytes
from diffusemix_pipeline.files import write_bytes


class EditStore:
    """Edits as PNG files named by their key; several processes may write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, key: str) -> Path:
        """Return where the edit of `key` lies, or would lie."""
        return self._folder / key[:2] / f"{key}.png"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def put(self, key: str, pixels: np.ndarray) -> None:
        """Keep uint8 (H, W, 3) pixels; an edit that is already there stays as it is."""
        if key not in self:
            write_bytes(self.path(key), png_bytes(pixels))
