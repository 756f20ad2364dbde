"""Identity: content hashes, fingerprints, and the seeds and draws that follow from them.

Nothing random in the pipeline depends on order, time or the number of workers: every seed and every
draw is a function of what the thing is (DESIGN, promise 2).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


def digest(*parts: Any) -> str:
    """Return 32 hex digits that identify `parts`: JSON values, compared by value and order."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex, reading it in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
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
    return max(options, key=lambda option: digest(*parts, option))
