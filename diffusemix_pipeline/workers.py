"""Work on all cores: one function over many items, by processes that live as long as that."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

from diffusemix_pipeline.devices import usable_cores
from diffusemix_pipeline.errors import UserError

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


@contextmanager
def in_processes(
    work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Iterator[Result]]:
    """Give an iterator over `work(item)`, in order; both can be pickled, and what it returns.

    Items are asked for a little ahead of what is given, so there may be more than memory holds.
    Raises UserError where a process is killed.
    """
    cores = usable_cores()
    if cores == 1:
        yield map(work, items)
        return
    get_ready(getattr(work, "func", work).__module__)
    pool = ProcessPoolExecutor(cores, get_context("forkserver"), end_with_parent)
    try:
        yield _in_order(pool, work, items, cores * _AHEAD)
    except BrokenProcessPool as error:
        raise UserError(
            "A process that worked on images was killed, as the system does where memory runs out: "
            "free memory and run again, which goes on where it was."
        ) from error
    finally:  # now: a process that ends while another is left waits for that one, for ever
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor,
    work: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int,
) -> Iterator[Result]:
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


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
