"""Files of named arrays: nothing in them is unpickled, and no byte that is not as written is read.

What does not belong here: weights, which are safetensors.
"""

import io
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusemix_pipeline.files import write_bytes


def write_arrays(path: Path, arrays: Mapping[str, Any], **how: Any) -> None:
    """Write arrays as one `.npz`, as `write_bytes` does."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # zip: a checksum an array
    write_bytes(path, buffer.getvalue(), **how)


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read arrays by name; one of many errors where a byte is not as it was written."""
    content = io.BytesIO(path.read_bytes())  # the system's errors are those of this alone
    if not zipfile.is_zipfile(content):  # numpy takes it for a pickle, and says how to trust one
        raise ValueError("it is no archive of arrays")
    content.seek(0)
    with np.load(content, allow_pickle=False) as arrays:
        if damaged := arrays.zip.testzip():  # reading alone checks no array that claims to be short
            raise ValueError(f"{damaged} is not as it was written")
        return {name: arrays[name] for name in names}
