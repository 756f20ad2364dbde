"""What was said of each edit before it was stored: some 50 bytes an edit, so of any number."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_IS_KEY = re.compile(r"[0-9a-f]{32}")
_KEY_BYTES, _SHA_BYTES = 16, 32
_SAID = np.dtype([("key", f"S{_KEY_BYTES}"), ("sha256", f"S{_SHA_BYTES}"), ("profile", ">u4")])


@dataclass(frozen=True, slots=True)
class Record:
    """What was said of an edit before it was stored."""

    sha256: str
    """Of the file's bytes."""
    profile: str
    """The numeric profile that made it: see `EditStore.add_profile`."""


class Records(Mapping[str, Record]):
    """Records by the keys of their edits; of what was said of the same one, the first counts."""

    def __init__(self, said: Iterable[Mapping[str, Any]]) -> None:
        """Read facts of `key`, `sha256` and `profile`."""
        self._profiles: dict[str, int] = {}
        rows = bytearray()
        for fact in said:
            profile = self._profiles.setdefault(fact["profile"], len(self._profiles))
            row = bytes.fromhex(fact["key"] + fact["sha256"]) + profile.to_bytes(4, "big")
            assert len(row) == _SAID.itemsize
            rows += row
        table = np.frombuffer(rows, _SAID)
        table = table[np.argsort(table["key"], kind="stable")]
        again = table["key"][1:] == table["key"][:-1]
        other = again & (table["sha256"][1:] != table["sha256"][:-1])
        self._disputed = table[np.isin(table["key"], table["key"][1:][other])]
        first = np.concatenate([[True], ~again])[: len(table)]
        self._keys = table["key"][first]  # by itself, as a search wants it in one piece
        self._shas, self._made_by = table["sha256"][first], table["profile"][first]
        self._names = list(self._profiles)

    def __getitem__(self, key: str) -> Record:
        if not _IS_KEY.fullmatch(key):
            raise KeyError(key)
        sought = bytes.fromhex(key)
        place = int(np.searchsorted(self._keys, np.bytes_(sought)))
        if place == len(self) or whole(self._keys[place], _KEY_BYTES) != sought:
            raise KeyError(key)
        return self._record(self._shas[place], self._made_by[place])

    def __iter__(self) -> Iterator[str]:
        return (whole(key, _KEY_BYTES).hex() for key in self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def count_by_profile(self, keys: Sequence[str]) -> dict[str, int]:
        """Count those of `keys` of which anything was said by the profile that made them."""
        sought = np.frombuffer(bytes.fromhex("".join(keys)), self._keys.dtype)
        sought = sought[np.isin(sought, self._keys)]
        made_by = self._made_by[self._keys.searchsorted(sought)]
        counts = zip(*np.unique(made_by, return_counts=True), strict=True)
        return {self._names[profile]: int(count) for profile, count in counts}

    def disputed(self) -> dict[str, list[Record]]:
        """Return all that was said of the edits of which different bytes were told."""
        found: dict[str, list[Record]] = {}
        for key, sha256, profile in self._disputed:
            record = self._record(sha256, profile)
            found.setdefault(whole(key, _KEY_BYTES).hex(), []).append(record)
        return found

    def settle(self, key: str, record: Record) -> None:
        """Let one of the records of a disputed edit count."""
        place = int(np.searchsorted(self._keys, np.bytes_(bytes.fromhex(key))))
        self._shas[place] = bytes.fromhex(record.sha256)
        self._made_by[place] = self._profiles[record.profile]

    def _record(self, sha256: bytes, profile: int) -> Record:
        return Record(whole(sha256, _SHA_BYTES).hex(), self._names[profile])


def whole(value: bytes, length: int) -> bytes:
    """Give back the zeros at the end of bytes, which numpy takes away."""
    return value.ljust(length, b"\0")
