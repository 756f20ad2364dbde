"""Python of a user's own: a file that a setting names where a built-in thing could stand.

What belongs here: finding what such a file defines. What does not: what it has to define, which is
said where that is used (an editor, a source of images, an arm). It runs with all that its user may
do, so only settings name one, and none that came with data: those lie where only the pipeline
writes.
"""

import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import digest

_THE_PIPELINES = ("data", "outputs", ".diffusemix")
_OF_A_PROJECT = ("diffusemix.yaml", "data.dvc", ".diffusemix")
_one_at_a_time = threading.Lock()


def is_own(name: str) -> bool:
    """Tell whether a setting's value names a Python file."""
    return name.endswith(".py")


def own_code(setting: str, name: str, wanted: str) -> Any:
    """Return what a file defines as `wanted`; it is run once, and again when its bytes change.

    UserError, with the setting, for a file that is not there, lies where only the pipeline writes,
    fails, or defines no such thing.
    """
    named = Path(name).expanduser().absolute()
    path = named.resolve()
    if not path.is_file():
        raise UserError(f"{setting}: there is no file {name}. Name one that defines {wanted}.")
    here = (Path(folder).resolve() for folder in _THE_PIPELINES)  # which may be links
    elsewhere = map(_is_the_pipelines, (*path.parents, *named.parents))
    if any(map(path.is_relative_to, here)) or any(elsewhere):
        raise UserError(
            f"{setting}: {name} lies where only the pipeline writes, and may have come from "
            "elsewhere. Read it, and move it to a folder of your own."
        )
    with _one_at_a_time:
        try:
            module = _run(path)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{setting}: {name} fails ({type(error).__name__}: {error}). Mend it."
            ) from error
    found = getattr(module, wanted, None)
    if found is None:
        raise UserError(f"{setting}: {name} defines no {wanted}. See docs/extending.md.")
    return found


def _is_the_pipelines(folder: Path) -> bool:
    """Tell whether only the pipeline writes there, in whichever project."""
    marks = (folder.parent / mark for mark in _OF_A_PROJECT)
    return folder.name in _THE_PIPELINES and any(mark.exists() for mark in marks)


def _run(path: Path) -> ModuleType:
    """Run a file as a module that is known by its bytes: Python's own way goes by their time."""
    content = path.read_bytes()
    known_as = f"{__name__}_{digest(str(path), content.hex())}"
    if known_as not in sys.modules:
        module = ModuleType(known_as)
        module.__file__ = str(path)
        sys.modules[known_as] = module  # where dataclasses look up how a class was defined
        try:
            exec(compile(content, path, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[known_as]
            raise
    return sys.modules[known_as]
