"""Work on all cores: one function over many items, by processes that live as long as that."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

from diffusemix_pipeline.devices import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
_IMPORTED_LATE = ("pandera.backends.pandas.register",)  # 0.2 s, when a table is read first
_AHEAD = 3  # items a process: one that it works on, and some that wait for it


def get_ready(module: str) -> None:
    """Start what workers are forked from, beside whatever is done until then: it takes a second.

    It imports a module, which no worker then has to; only the first call has any effect.
    """
    if usable_cores() > 1:
        # A plain fork may wait for ever for a lock that one of our threads has.
        forkserver.set_forkserver_preload([module, *_IMPORTED_LATE])
        forkserver.ensure_running()


def in_processes(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Give `work(item)` for each item, in order; both can be pickled, and so can what it returns.

    Items are asked for a little ahead of what is given, so there may be more than memory holds.
    """
    cores = usable_cores()
    if cores == 1:
        yield from map(work, items)
        return
    get_ready(getattr(work, "func", work).__module__)
    pool = ProcessPoolExecutor(cores, get_context("forkserver"), end_with_parent)
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
