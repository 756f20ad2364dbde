"""Identity: content hashes, fingerprints, and the seeds and draws that follow from them.

Nothing random in the pipeline depends on order, time or the number of workers: every seed and every
draw is a function of what the thing is, so the same inputs and settings give the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20
_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def digest(*parts: Any) -> str:
    """Return 32 hex digits that identify `parts`: JSON values, compared by value and order."""
    return _hasher(_json(parts)).hexdigest()


def digest_of_text(pieces: Iterable[str]) -> str:
    """Return `digest("".join(pieces))`, holding one piece at a time."""
    hasher = _hasher('["')
    for piece in pieces:
        hasher.update(_json(piece)[1:-1].encode())
    hasher.update(b'"]')
    return hasher.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex, reading it in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def seed_from(*parts: Any) -> int:
    """Return a seed in [0, 2**63) that depends on `parts` alone."""
    return int(digest(*parts)[:16], 16) >> 1


def draw(options: Sequence[str], *parts: Any) -> str:
    """Draw one option: the one whose hash together with `parts` is largest (rendezvous hashing).

    Adding an option to n of them moves about 1/(n+1) of the draws and leaves the rest as they were.
    """
    begun = _hasher(_json(parts)[:-1] + ",")

    def place(option: str) -> bytes:
        """Return digest(*parts, option), the parts hashed once for all options."""
        hasher = begun.copy()
        hasher.update(f"{_json(option)}]".encode())
        return hasher.digest()

    return max(options, key=place)


def _hasher(text: str) -> Any:
    return hashlib.blake2b(text.encode(), digest_size=16)
