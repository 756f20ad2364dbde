"""Python of a user's own: a file that a setting names where a built-in thing could stand.

What belongs here: finding what such a file defines. What does not: what it has to define, which is
said where that is used (an editor, a source of images, an arm). It runs with all that its user may
do, so only settings name one: never a dataset, a checkpoint or a remote.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import digest, file_sha256


def is_own(name: str) -> bool:
    """Tell whether a setting's value names a Python file."""
    return name.endswith(".py")


def own_code(setting: str, name: str, wanted: str) -> Any:
    """Return what a file defines as `wanted`; it is run once, and again when its bytes change.

    UserError, with the setting, for a file that is not there, fails, or defines no such thing.
    """
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{setting}: there is no file {name}. Name one that defines {wanted}.")
    # Known to Python by its bytes: dataclasses and pickle look up where a class was defined.
    known_as = f"{__name__}_{digest(str(path), file_sha256(path))}"
    if known_as not in sys.modules:
        spec = importlib.util.spec_from_file_location(known_as, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[known_as] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[known_as]
            raise UserError(
                f"{setting}: {name} fails ({type(error).__name__}: {error}). Mend it."
            ) from error
    found = getattr(sys.modules[known_as], wanted, None)
    if found is None:
        raise UserError(f"{setting}: {name} defines no {wanted}. See docs/extending.md.")
    return found
