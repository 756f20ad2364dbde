"""Writing so that a reader never sees half of anything: write aside, then rename."""

import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from diffusemix_pipeline.errors import UserError, first_line

BEGUN = ".begun"
"""Ends the name of what goes on where it was cut off, and goes when it is finished."""
_OLD = ".old"


def write_bytes(path: Path, content: bytes, *, aside: Path | None = None) -> None:
    """Write a whole file or nothing; parents are made, an older file is replaced.

    What a kill leaves half-written lies in `aside`, on the same file system, or else beside `path`.
    """
    folder = aside or path.parent
    for needed in (folder, path.parent):
        needed.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_once(path: Path, content: bytes, *, aside: Path) -> None:
    """Write a whole file or nothing, unless there is one: of two writers at once, the first stays.

    `aside` lies on the same file system.
    """
    if path.exists():
        return
    for needed in (aside, path.parent):
        needed.mkdir(parents=True, exist_ok=True)
    partial = aside / f"{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        partial.write_bytes(content)
        try:
            os.link(partial, path)  # unlike a rename, this takes no other file's place
        except FileExistsError:
            return
        except FileNotFoundError:  # somebody removed what was written aside
            raise
        except OSError:  # a file system without links
            with FileLock(aside / "write_once.lock"):
                if not path.exists():
                    partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_if_changed(path: Path, content: bytes, *, aside: Path) -> None:
    """Write a whole file, but leave one that holds the same bytes as it is, with its time."""
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content, aside=aside)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that people read and that is the same for the same value."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


@contextmanager
def undamaged(path: Path, repair: str) -> Iterator[None]:
    """Read a file that only this project writes: UserError names one that is damaged, and `repair`.

    A file that is not there, or that the system does not let us read, is no damaged one.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Arrow, PIL and safetensors raise dozens of types for broken files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} is damaged ({why}). {repair}") from error


class Ledger:
    """Facts that are only ever added, by several processes at once: each appends to its own file.

    What was added is there whatever happens next; of a line that a kill tore, nothing is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: tuple[int, Path] | None = None

    def add(self, *facts: dict[str, Any]) -> None:
        """Append some JSON objects."""
        if self._own is None or self._own[0] != os.getpid():  # a fork writes a file of its own
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"{socket.gethostname()}.{uuid.uuid4().hex}.jsonl"
            self._own = (os.getpid(), self._folder / name)
        try:
            with self._own[1].open("ab") as file:
                file.write("".join(json.dumps(fact) + "\n" for fact in facts).encode())
        except OSError:
            self._own = None  # half a line may be there: the next fact begins another file
            raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read all facts, a process's in the order in which it added them."""
        for path in sorted(self._folder.glob("*.jsonl")):
            with path.open("rb") as file:
                for line in file:
                    with suppress(ValueError):  # torn by a kill or a full disk
                        yield json.loads(line)


def clear_aside(folder: Path, homes: Iterable[Path] = ()) -> None:
    """Remove what killed writers left half-written; what can be gone on from stays.

    Where one was killed between the two renames of `replaced_folder`, the older version of a folder
    of `homes` is put back: nothing else may have all of what it holds.
    """
    for home in homes:
        for old in folder.glob(f"{home.name}.*{_OLD}"):
            if not home.exists():
                old.rename(home)
    for path in folder.glob("*"):
        if path.suffix == BEGUN:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` share the bytes of `source` where the file system can, else copy them."""
    try:
        try:
            os.link(source, target)
        except FileNotFoundError:  # asked of all, it would take longer than most links
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def check_replaceable(folder: Path, mark: str) -> None:
    """Raise UserError where `folder` holds anything, but not the file by which it is known as ours.

    A person's files are never deleted, whatever folder they lie in.
    """
    if folder.exists() and not (folder / mark).exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} would be written anew, but it holds files that were not made here: it has "
            f"no {mark}. Move them elsewhere; where `dvc checkout` was cut off, run it again."
        )


@contextmanager
def replaced_folder(folder: Path, *, mark: str, aside: Path) -> Iterator[Path]:
    """Give an empty folder to fill; on success it takes the place of `folder`, on error it goes.

    `mark` is a file that every whole version of the folder holds: see `check_replaceable`.
    `aside` lies on the same file system, outside of anything versioned.
    """
    check_replaceable(folder, mark)
    aside.mkdir(parents=True, exist_ok=True)
    partial = aside / f"{folder.name}.{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        folder.parent.mkdir(parents=True, exist_ok=True)
        old = aside / f"{partial.name}{_OLD}"
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
