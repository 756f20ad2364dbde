"""Sampling planned edits: full batches, workers, out of memory, and files beside the device.

What belongs here: whatever every editor needs around `edit`. What does not: which edits are wanted
(`generate.py`), and how one is sampled (a module a family of editors).
"""

import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusemix_pipeline.datasets.images import read_square
from diffusemix_pipeline.editing.editor import Editor
from diffusemix_pipeline.editing.store import EditStore, Record
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.progress import Progress


@dataclass(frozen=True)
class PlannedEdit:
    """One wanted edit: `key` identifies its bytes, `row` goes into the manifest."""

    key: str
    source: Path
    instruction: str
    seed: int
    row: dict[str, Any]


@dataclass(frozen=True)
class _Sampled:
    """The edits of one batch: uint8 (B, S, S, 3), and the shape of batch that made them."""

    batch: Sequence[PlannedEdit]
    pixels: np.ndarray
    shape: int


class Sampler:
    """Samples with one editor; the batch shrinks for good where the device has too little memory.

    On a CPU, a worker a core samples batches of its own on one thread: that is faster than many
    threads on one batch, and the bytes do not depend on the number of cores.
    """

    def __init__(self, editor: Editor, device: str, size: int, batch_size: int) -> None:
        self._editor, self._size = editor, size
        self._batch_size = batch_size
        self._workers = len(os.sched_getaffinity(0)) if device == "cpu" else 1
        self._profile = editor.profile() | ({"threads": 1} if device == "cpu" else {})

    def make(
        self, planned: Sequence[PlannedEdit], store: EditStore, progress: Progress
    ) -> dict[str, Record]:
        """Keep each edit in the store as soon as its batch is there; return the records by key.

        Sources are read and edits encoded beside the sampling: files never hold the device.
        """
        for instruction in sorted({edit.instruction for edit in planned}):
            self._editor.check_instruction(instruction)
        records: dict[str, Record] = {}
        progress("Editing images", 0, len(planned))
        with _one_thread_each(self._workers) as sampling, ThreadPoolExecutor(1) as writing:
            writes: deque[Future[dict[str, Record]]] = deque()
            for sampled in self._sampled(planned, sampling):
                writes.append(writing.submit(self._keep, sampled, store))
                while len(writes) > 1:
                    records |= writes.popleft().result()
                progress("Editing images", len(records) + len(sampled.batch), len(planned))
            for write in writes:
                records |= write.result()
        return records

    def _sampled(
        self, planned: Sequence[PlannedEdit], pool: ThreadPoolExecutor
    ) -> Iterator[_Sampled]:
        """Yield batch after batch, with one more in work than there are workers."""
        waiting: deque[Future[list[_Sampled]]] = deque()
        start = 0
        while start < len(planned) or waiting:
            while start < len(planned) and len(waiting) <= self._workers:
                batch = planned[start : start + self._batch_size]
                start += len(batch)
                images = np.stack([read_square(edit.source, self._size) for edit in batch])
                waiting.append(pool.submit(self._edit, batch, images))
            yield from waiting.popleft().result()

    def _edit(self, batch: Sequence[PlannedEdit], images: np.ndarray) -> list[_Sampled]:
        """Edit a batch, in smaller ones if memory does not suffice for its shape."""
        shape = self._batch_size
        try:
            return [
                self._edit_padded(
                    batch[start : start + shape], images[start : start + shape], shape
                )
                for start in range(0, len(batch), shape)
            ]
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        # Here, and not among the handlers: an exception holds on to the tensors of its frames.
        if shape == 1:
            raise UserError(
                f"The device has too little memory for one edit of {self._size} px: try a smaller "
                "size, editing.dtype=float16 or another device."
            )
        self._batch_size = min(self._batch_size, shape // 2)
        warnings.warn(
            f"Memory does not suffice for {shape} edits at once: going on with "
            f"{self._batch_size}, which is another numeric profile.",
            stacklevel=2,
        )
        torch.cuda.empty_cache()
        return self._edit(batch, images)

    def _edit_padded(
        self, batch: Sequence[PlannedEdit], images: np.ndarray, shape: int
    ) -> _Sampled:
        """Fill a batch up to its shape, on which the bytes of its members depend."""
        filled = [min(index, len(batch) - 1) for index in range(shape)]
        edited = self._editor.edit(
            images[filled],
            [batch[index].instruction for index in filled],
            [batch[index].seed for index in filled],
        )
        return _Sampled(batch, edited[: len(batch)], shape)

    def _keep(self, sampled: _Sampled, store: EditStore) -> dict[str, Record]:
        profile = store.add_profile(self._profile | {"batch_size": sampled.shape})
        pairs = zip(sampled.batch, sampled.pixels, strict=True)
        return {edit.key: store.put(edit.key, pixels, profile) for edit, pixels in pairs}


@contextmanager
def _one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads compute on one core; what waits is given up when the block is left."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads that start later would take theirs from the pool's


def _out_of_memory(error: RuntimeError) -> bool:
    """Tell what torch raises on CUDA by type, and on MPS and CPUs by text alone."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        "out of memory" in text or "can't allocate memory" in text
    )
