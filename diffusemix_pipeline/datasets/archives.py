"""Published archives: found in a folder, else downloaded, and unpacked before anything reads them.

A folder that a dataset is read from is there as a whole or not at all: what is downloaded or
unpacked is so under another name, and renamed. What does not belong here: what the files hold.
"""

import gzip
import http.client
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.progress import Progress

_DAMAGED = (
    *(EOFError, LookupError, RuntimeError, ValueError),
    *(gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile, zlib.error),
)
_NOT_DOWNLOADED = (OSError, RuntimeError, ValueError, http.client.HTTPException)


class Archive(NamedTuple):
    """A published file and what it becomes below the folder of archives."""

    name: str
    gives: str
    """A folder, which the archive holds under the same last name; or a file, as it is."""
    url: str = ""
    """Empty where it cannot be downloaded."""
    md5: str = ""
    flat: bool = False
    """Whether the archive's files lie in no folder."""


def downloadable(url: str, gives: str, md5: str) -> Archive:
    """Return an archive that its publisher gives to anyone."""
    return Archive(url.rpartition("/")[2], gives, url, md5)


def check_obtainable(archives: Sequence[Archive], folder: Path, where: str) -> None:
    """Raise UserError that names every archive that is neither here nor can be downloaded."""
    wanted = [a for a in _not_unpacked(archives, folder) if not a.url and not _packed(a, folder)]
    if wanted:
        names = ", ".join(archive.name for archive in wanted)
        unpacked = ", ".join(archive.gives for archive in wanted)
        raise UserError(
            f"{folder} lacks {names}, to be fetched by hand: {where}. Put what you get there as it "
            f"is, or unpacked as {unpacked}; source.archives names another folder."
        )


def provide(archives: Sequence[Archive], folder: Path, where: str, progress: Progress) -> None:
    """Download and unpack what is not unpacked below `folder` yet; packed files stay.

    Raises UserError for what cannot be had, what is damaged, and what would lead out of `folder`.
    """
    if not _not_unpacked(archives, folder):
        return  # it may be read-only
    check_obtainable(archives, folder, where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # whoever waited finds it done
            for archive in _not_unpacked(archives, folder):
                packed = _packed(archive, folder) or _download(archive, folder, progress)
                _unpack(archive, packed, folder / archive.gives, progress)
    except OSError as error:
        raise UserError(
            f"Nothing can be unpacked in {folder} ({error}). Make room, unpack it by hand, or name "
            "another folder: source.archives."
        ) from None


def _not_unpacked(archives: Sequence[Archive], folder: Path) -> list[Archive]:
    return [archive for archive in archives if not (folder / archive.gives).exists()]


def _packed(archive: Archive, folder: Path) -> Path | None:
    """Return where an archive lies: in the folder, or beside what it becomes."""
    beside = (folder / archive.gives).with_name(archive.name)
    return next((path for path in (folder / archive.name, beside) if path.is_file()), None)


def _download(archive: Archive, folder: Path, progress: Progress) -> Path:
    from torchvision.datasets.utils import download_url

    aside = _emptied(folder / f".{archive.name}.partial")
    progress(f"Downloading {archive.name}", 0, 1)
    try:
        download_url(archive.url, aside, archive.name, archive.md5)
        progress(f"Downloading {archive.name}", 1, 1)
        return (aside / archive.name).rename(folder / archive.name)
    except _NOT_DOWNLOADED as error:
        raise UserError(
            f"{archive.url} could not be downloaded ({type(error).__name__}: {error}). Try again, "
            f"or get the file elsewhere and put it into {folder}."
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _unpack(archive: Archive, packed: Path, target: Path, progress: Progress) -> None:
    aside = _emptied(target.with_name(f".{target.name}.partial"))
    progress(f"Unpacking {archive.name}", 0, 1)
    try:
        if packed.suffix == ".zip":
            _unpack_zip(packed, aside)
        elif packed.suffix in (".tar", ".gz", ".tgz"):
            with tarfile.open(packed) as tar:
                _unpack_tar(tar, aside)
        else:
            shutil.copyfile(packed, aside / target.name)
        whole = aside if archive.flat else aside / target.name
        if not whole.exists():
            raise ValueError(f"there is no {target.name} in it")
        whole.rename(target)
        progress(f"Unpacking {archive.name}", 1, 1)
    except _DAMAGED as error:
        raise UserError(
            f"{packed} cannot be unpacked ({type(error).__name__}: {error}): it is damaged, or not "
            "what was published. Get it anew."
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _unpack_tar(tar: tarfile.TarFile, into: Path) -> None:
    """Unpack a tar whose members may be tars, as ImageNet's are: each becomes a folder."""
    for member in tar:
        if member.isfile() and member.name.endswith(".tar"):
            inner = member.replace(name=member.name.removesuffix(".tar"))
            folder = into / tarfile.data_filter(inner, str(into)).name
            with tarfile.open(fileobj=tar.extractfile(member)) as tar_within:
                tar_within.extractall(folder, filter="data")
        else:
            tar.extract(member, into, filter="data")


def _unpack_zip(packed: Path, into: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        for name in archive.namelist():
            if not (into / name).resolve().is_relative_to(into.resolve()):
                raise ValueError(f"{name} would lie outside of it")
        archive.extractall(into)


def _emptied(folder: Path) -> Path:
    """Return an empty folder, without what a killed process left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
