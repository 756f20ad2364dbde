"""What a label gate said of each edit: some 20 bytes an edit, so of any number."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from diffusemix_pipeline.editing.planning import case
from diffusemix_pipeline.editing.records import whole

_SAID = np.dtype([("case", "S16"), ("verdict", "u1")])


class Verdicts:
    """The verdicts on what was judged, by case: see `PlannedEdit.case`. The last said counts."""

    def __init__(self, said: Iterable[Mapping[str, Any]]) -> None:
        """Read facts of `key`, `label` and `verdict`."""
        names: dict[str, int] = {}
        rows = bytearray()
        for fact in said:
            verdict = names.setdefault(fact["verdict"], len(names))
            rows += _digest(case(fact["key"], fact["label"])) + bytes([verdict])
        table = np.frombuffer(rows, _SAID)[::-1]
        self._cases, last = np.unique(table["case"], return_index=True)
        self._verdicts, self._names = table["verdict"][last], list(names)

    def get(self, judged: str, default: str = "") -> str:
        """Return the verdict on a case, or the default where there is none."""
        digest = _digest(judged)
        place = int(self._cases.searchsorted(np.bytes_(digest)))
        if place == len(self._cases) or whole(self._cases[place], len(digest)) != digest:
            return default
        return self._names[self._verdicts[place]]

    def __contains__(self, judged: str) -> bool:
        return bool(self.get(judged))


def _digest(judged: str) -> bytes:
    return hashlib.blake2b(judged.encode(), digest_size=_SAID["case"].itemsize).digest()
