"""The edit store: every edit that was ever paid for, by what determines it, outside of `data/`.

What lies in its folder: `<key[:2]>/<key>.png`, an edit each; `records/*.jsonl`, a file a writing
process with a line an edit: key, SHA-256 and numeric profile; `profiles/<digest>.json`, what made
those bytes; `quarantine/`, files that are not what was stored; `aside/`, files that are just being
written.
"""

import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusemix_pipeline.datasets.images import png_bytes
from diffusemix_pipeline.editing.records import Record, Records
from diffusemix_pipeline.editing.shared_edits import Shared, SharedEdits
from diffusemix_pipeline.files import Ledger, write_json, write_once
from diffusemix_pipeline.identity import digest, file_sha256
from diffusemix_pipeline.progress import Progress, silent

_RECORDS, _PROFILES, _ASIDE = "records", "profiles", "aside"


@dataclass(frozen=True)
class Status:
    """What a store holds: edits, their bytes on disk, edits by profile, and files set aside."""

    edits: int
    bytes: int
    by_profile: dict[str, int]
    """Edits by the digest of the numeric profile that made them."""
    profiles: dict[str, dict[str, Any]]
    """What those digests stand for."""
    quarantined: int


class EditStore:
    """Edits as PNG files named by their key; several processes may write at once.

    An edit is there as a whole or not at all. Where two processes make the same one, the bytes that
    came first stay. Its record is written before its file: a file without one is not the store's.
    """

    def __init__(self, folder: Path, shared: str = "") -> None:
        """Open the store in `folder`; `shared` is the URL where other machines find its edits."""
        self._folder = folder
        self._records = Ledger(folder / _RECORDS)
        self._shared = SharedEdits(shared) if shared else None
        self._told: set[str] = set()  # profiles that are known on both sides

    @property
    def quarantine(self) -> Path:
        """Where files go that are not what was stored."""
        return self._folder / "quarantine"

    def path(self, key: str) -> Path:
        """Return where the edit of `key` lies, or would lie."""
        return self._folder / key[:2] / f"{key}.png"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def add_profile(self, profile: Mapping[str, Any]) -> str:
        """Keep what determines bytes beside the key (device, versions, dtype, batch shape).

        Returns the digest by which records name it.
        """
        name = digest(profile)
        path = self._folder / _PROFILES / f"{name}.json"
        if not path.exists():
            write_json(path, dict(profile))
        return name

    def put(self, key: str, pixels: np.ndarray, profile: str) -> Record:
        """Keep uint8 (H, W, 3) pixels, unless the edit is there already; return what was said."""
        return self.put_file(key, png_bytes(pixels), profile)

    def put_file(self, key: str, content: bytes, profile: str) -> Record:
        """Keep the bytes of an edit's file, as `put`."""
        record = Record(hashlib.sha256(content).hexdigest(), profile)
        self._records.add({"key": key, **asdict(record)})
        write_once(self.path(key), content, aside=self._folder / _ASIDE)
        return record

    def exchange(self, keys: Collection[str], progress: Progress = silent) -> None:
        """Bring those of `keys` that are shared and not here, and share those that only are here.

        Nothing happens where edits are not shared.
        """
        if self._shared is None:
            return
        there = self._shared.find(keys)
        lacking = [edit for key, edit in there.items() if key not in self]
        for done, (edit, content) in enumerate(self._shared.read(lacking), start=1):
            progress("Bringing shared edits", done, len(lacking))
            if content is None:
                del there[edit.key]
                continue
            if edit.profile not in self._told:
                self.add_profile(self._shared.profile(edit.profile))
                self._told.add(edit.profile)
            self.put_file(edit.key, content, edit.profile)
        own = [key for key in keys if key not in there and key in self]
        if own:
            records = self.records()
            self.share({key: records[key] for key in own if key in records}, progress)

    def share(self, stored: Mapping[str, Record], progress: Progress = silent) -> None:
        """Put edits of this store where other machines find them, if there is such a place."""
        if self._shared is None:
            return
        for profile in {record.profile for record in stored.values()} - self._told:
            self._shared.add_profile(profile, self.profiles()[profile])
            self._told.add(profile)
        edits = {Shared(key, *astuple(record)): self.path(key) for key, record in stored.items()}
        self._shared.add(edits, progress)

    def records(self) -> Records:
        """Read what was said of each edit.

        Where processes that made the same one said different things, it is what the file's bytes
        are; only then a file is read.
        """
        records = Records(self._records)
        for key, said in records.disputed().items():
            if key in self:
                sha256 = file_sha256(self.path(key))
                records.settle(key, next((r for r in said if r.sha256 == sha256), said[0]))
        return records

    def profiles(self) -> dict[str, dict[str, Any]]:
        """Return the numeric profiles by the digests that stand for them in records."""
        return {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in (self._folder / _PROFILES).glob("*.json")
        }

    def checked(self, keys: Collection[str], progress: Progress = silent) -> set[str]:
        """Return those `keys` that are there as they were stored, by reading them.

        A file that has changed since, or that has no record, goes to `quarantine/`.
        """
        records, sound = self.records(), set()
        for done, key in enumerate(keys, start=1):
            progress("Checking stored edits", done, len(keys))
            if key not in self:
                continue
            if key in records and file_sha256(self.path(key)) == records[key].sha256:
                sound.add(key)
            else:
                self._set_aside(key)
        return sound

    def __iter__(self) -> Iterator[str]:
        """List the keys of the edits that are there."""
        for folder in sorted(self._folder.glob("[0-9a-f][0-9a-f]")):
            yield from (path.stem for path in sorted(folder.glob("*.png")))

    def status(self) -> Status:
        """Count what the store holds, by the profiles in the records."""
        records = self.records()
        made_by, size = Counter[str](), 0
        for key in self:
            size += self.path(key).stat().st_size
            made_by.update([records[key].profile] if key in records else [])
        quarantined = len(list(self.quarantine.iterdir())) if self.quarantine.exists() else 0
        return Status(made_by.total(), size, dict(made_by), self.profiles(), quarantined)

    def remove(self, keys: Iterable[str]) -> None:
        """Delete edits' files, and what killed writers left; nobody else may be writing.

        Their records stay: where one is made again with other bytes, `records` goes by these.
        """
        shutil.rmtree(self._folder / _ASIDE, ignore_errors=True)
        for key in keys:
            self.path(key).unlink(missing_ok=True)

    def _set_aside(self, key: str) -> None:
        self.quarantine.mkdir(exist_ok=True)
        self.path(key).replace(self.quarantine / f"{key}.{uuid.uuid4().hex[:8]}.png")
