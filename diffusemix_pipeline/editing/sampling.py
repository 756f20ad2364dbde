"""Sampling planned edits: full batches, workers, out of memory, and files beside the device.

What belongs here: whatever every editor needs around `edit`. What does not: which edits are wanted
(`planning.py`), and how one is sampled (a module a family of editors).
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from itertools import islice
from threading import Semaphore

import numpy as np
import torch
from PIL import Image

from diffusemix_pipeline.datasets.images import decode_square, to_square
from diffusemix_pipeline.editing.editor import Editor
from diffusemix_pipeline.editing.planning import PlannedEdit, SourceImage, edited_side
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.progress import Progress
from diffusemix_pipeline.settings import Settings


class Sampler:
    """Samples with one editor; the batch shrinks for good where the device has too little memory.

    On a CPU, a worker a core samples batches of its own on one thread: that is faster than many
    threads on one batch, and the bytes do not depend on the number of cores. On an accelerator, two
    workers take turns: one samples while the other one reads, encodes and writes.
    """

    def __init__(self, editor: Editor, device: str, settings: Settings, batch_size: int) -> None:
        self._editor = editor
        self._side, self._size = edited_side(settings), settings.size
        self._batch_size, self._called = batch_size, settings.editing.editor
        on_cpu = device == "cpu"
        self._workers = workers_on(device) if on_cpu else 2
        self._device = Semaphore(workers_on(device))
        self._profile = editor.profile() | ({"threads": 1} if on_cpu else {})

    def make(
        self, planned: Iterable[PlannedEdit], total: int, store: EditStore, progress: Progress
    ) -> None:
        """Keep each edit in the store as soon as its batch is sampled.

        `planned` gives `total` edits, and is asked for them when they are to be sampled.
        """
        done, edits = 0, iter(planned)
        waiting: set[Future[int]] = set()
        progress("Editing images", done, total)
        with _one_thread_each(self._workers) as pool:
            while batch := list(islice(edits, self._batch_size)):
                waiting.add(pool.submit(self._make, batch, store))
                if len(waiting) > self._workers:  # one waits for whoever is ready first
                    made, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    done += sum(each.result() for each in made)
                    progress("Editing images", done, total)
            for each in as_completed(waiting):
                done += each.result()
                progress("Editing images", done, total)

    def _make(self, batch: Sequence[PlannedEdit], store: EditStore) -> int:
        """Read, edit and keep one batch; return its length."""
        images = np.stack([self._read(edit.source) for edit in batch])
        with self._device:
            parts = self._edit(batch, images)
        left, stored = iter(batch), {}
        for part, shape in parts:
            profile = store.add_profile(self._profile | {"batch_size": shape})
            for edit, pixels in zip(islice(left, len(part)), part, strict=True):
                square = to_square(Image.fromarray(pixels), self._size)
                stored[edit.key] = store.put(edit.key, square, profile)
        store.share(stored)
        return len(batch)

    def _read(self, source: SourceImage) -> np.ndarray:
        """Read an image, whose bytes must be those that its edits are known by."""
        content = source.content()
        if hashlib.sha256(content).hexdigest() != source.sha256:
            raise UserError(
                f"{source.files.folder / source.file_name} is not as it was when the images were "
                f"read. Remove {source.files.folder} and run again: it is read anew, or pulled."
            )
        return decode_square(content, self._side)

    def _edit(
        self, batch: Sequence[PlannedEdit], images: np.ndarray
    ) -> list[tuple[np.ndarray, int]]:
        """Edit a batch, in smaller ones if memory does not suffice for its shape.

        Returns the edits in order, in parts with the shape of batch that made them.
        """
        shape = self._batch_size
        try:
            parts = [slice(start, start + shape) for start in range(0, len(batch), shape)]
            return [(self._edit_padded(batch[part], images[part], shape), shape) for part in parts]
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        # Here, and not among the handlers: an exception holds on to the tensors of its frames.
        if shape == 1:
            raise UserError(
                f"The device has too little memory for one edit of {self._side} px: free some and "
                "run again, or try a smaller size, editing.dtype=float16 or another device."
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
    ) -> np.ndarray:
        """Fill a batch up to its shape, on which the bytes of its members depend."""
        filled = [min(index, len(batch) - 1) for index in range(shape)]
        edited = self._editor.edit(
            images[filled],
            [batch[index].instruction for index in filled],
            [batch[index].seed for index in filled],
        )
        if edited.shape != images[filled].shape or edited.dtype != np.uint8:
            raise UserError(
                f"editing.editor: {self._called} made {edited.dtype} "
                f"{edited.shape} of uint8 {images[filled].shape}: an edit has its image's shape."
            )
        return edited[: len(batch)]


def workers_on(device: str) -> int:
    """Return how many batches are sampled at once: one a core, or one on an accelerator."""
    return torch.get_num_threads() if device == "cpu" else 1


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


def _out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Tell what Python, and torch on CUDA, raise by type, its libraries, MPS and CPUs by text."""
    said = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    # oneDNN's words for it; of what it cannot do at all, it names a primitive descriptor.
    known |= str(error) == "could not create a primitive"
    return known or any(text in str(error) for text in said)
