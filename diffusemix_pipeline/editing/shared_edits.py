"""Edits that machines share: a bucket of S3, or of whatever else fsspec can name.

What lies there: `<key[:2]>/<key>.<SHA-256>.<profile>.png`, an edit each, whose name says all that
its record in a store does, so that objects never change and nobody waits for another; and
`profiles/<digest>.json`, as in a store (`store.py`). Secrets come from the environment, as botocore
and its like read them; they are no settings.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.progress import Progress, silent

_AT_ONCE = 256  # edits, of some 100 kB
_LISTED_AT_ONCE = 16


class Shared(NamedTuple):
    """An edit as its name in the bucket tells it."""

    key: str
    sha256: str
    profile: str

    @property
    def name(self) -> str:
        """Its path below the URL."""
        return f"{self.key[:2]}/{self.key}.{self.sha256}.{self.profile}.png"

    def names(self, content: bytes) -> bool:
        """Tell whether these are its file's bytes."""
        return hashlib.sha256(content).hexdigest() == self.sha256


class SharedEdits:
    """The edits below an fsspec URL, such as `s3://bucket/edits`. Nothing is ever replaced."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url
        try:
            # Others write there too, so a listing is never kept.
            self._fs, self._root = fsspec.core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True
            )
        except (ImportError, ValueError) as error:  # its messages name the package, or the protocol
            raise UserError(
                f"storage.edits: {url} cannot be opened: {error}. What s3:// needs is brought by "
                "`make install`; elsewhere, by `pip install '.[s3]'` in a clone."
            ) from error

    def check(self) -> None:
        """Raise UserError where this machine cannot read and write there."""
        mark = f"{self._root}/written-by-the-last-who-came.txt"
        try:
            self._fs.pipe_file(mark, b"diffusemix\n")
            self._fs.cat_file(mark)
        except Exception as error:  # every kind of storage has its own
            raise UserError(
                f"storage.edits: {self._url} cannot be read and written: {error!r}. Make the "
                "bucket if there is none, and give the environment its address and secrets "
                "(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."
            ) from error

    def find(self, keys: Collection[str]) -> dict[str, Shared]:
        """Return those of `keys` that are there; where processes made different bytes, one each."""
        by_folder = defaultdict(set)
        for key in keys:
            by_folder[key[:2]].add(key)
        found: dict[str, Shared] = {}
        with ThreadPoolExecutor(_LISTED_AT_ONCE) as pool:
            for listed, wanted in zip(
                pool.map(self._list, by_folder), by_folder.values(), strict=True
            ):
                for edit in listed:
                    if edit.key in wanted:
                        found[edit.key] = min(edit, found.get(edit.key, edit))
        return found

    def read(self, edits: Collection[Shared]) -> Iterator[tuple[Shared, bytes | None]]:
        """Give each edit's file; None where it is gone or, and then it goes, is another's bytes."""
        for some in _parts(list(edits)):
            paths = [self._path(edit.name) for edit in some]
            contents = self._fs.cat(paths, on_error="return")
            for edit, path in zip(some, paths, strict=True):
                content = contents[path]
                if isinstance(content, FileNotFoundError):
                    yield edit, None
                elif isinstance(content, BaseException):
                    raise content
                elif edit.names(content):
                    yield edit, content
                else:
                    self._fs.rm_file(path)
                    yield edit, None

    def add(self, edits: Mapping[Shared, Path], progress: Progress = silent) -> None:
        """Put edits' files there, those that are what their names say."""
        done = 0
        for some in _parts(list(edits)):
            contents = {edit: edits[edit].read_bytes() for edit in some}
            self._write({edit.name: c for edit, c in contents.items() if edit.names(c)})
            done += len(some)
            progress("Sharing edits", done, len(edits))

    def profile(self, name: str) -> dict[str, Any]:
        """Return a numeric profile by its digest."""
        return json.loads(self._fs.cat_file(self._path(f"profiles/{name}.json")))

    def add_profile(self, name: str, profile: Mapping[str, Any]) -> None:
        """Put a numeric profile there, unless it is."""
        path = f"profiles/{name}.json"
        if not self._fs.exists(self._path(path)):
            self._write({path: json.dumps(profile, indent=2, sort_keys=True).encode()})

    def _list(self, folder: str) -> list[Shared]:
        try:
            paths = self._fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        names = (path.rsplit("/", 1)[-1].split(".") for path in paths)
        return [Shared(*parts[:3]) for parts in names if len(parts) == 4 and parts[3] == "png"]

    def _write(self, contents: Mapping[str, bytes]) -> None:
        self._fs.pipe({self._path(name): content for name, content in contents.items()})

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _parts(edits: list[Shared]) -> Iterator[list[Shared]]:
    """Give so many edits that their files fit into memory, and few requests wait for many."""
    return (edits[start : start + _AT_ONCE] for start in range(0, len(edits), _AT_ONCE))
