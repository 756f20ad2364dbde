"""Work on all cores: one function over many items, by processes that live as long as that."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

from diffusemix_pipeline.devices import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
_IMPORTED_LATE = ("pandera.backends.pandas.register",)  # half a second, when a table is read first
_AHEAD = 3  # items a process: one that it works on, and some that wait for it


def in_processes(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Give `work(item)` for each item, in order; both can be pickled, and so can what it returns.

    Items are asked for a little ahead of what is given, so there may be more than memory holds.
    """
    cores = usable_cores()
    if cores == 1:
        yield from map(work, items)
        return
    # A plain fork may wait for ever for a lock that one of our threads has.
    context = get_context("forkserver")
    # What the server has imported, no process has to. Only the first call has any effect.
    context.set_forkserver_preload([getattr(work, "func", work).__module__, *_IMPORTED_LATE])
    pool = ProcessPoolExecutor(cores, context, end_with_parent)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) == cores * _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Let this process end at once where its parent is killed, and write nothing more.

    One that multiprocessing did not start has no parent, and goes on.
    """
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
