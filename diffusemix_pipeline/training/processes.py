"""Several processes that train one model together, a device each (DistributedDataParallel).

What belongs here: starting them, hearing from them, and ending them. What does not: training.
"""

import os
import socket
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
from torch.multiprocessing import get_context, spawn

_LISTEN_SECONDS = 0.2

Tell = Callable[..., None]
"""Passes what it is given to the process that started the others."""


def train_together(
    number: int,
    device: str,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    hear: Callable[..., None],
) -> None:
    """Call `work(*arguments, group, tell)` in `number` processes, and `hear` with what they tell.

    `work` is a function of a module, and what it is given can be pickled. Returns when all have
    ended; where one fails, the others are ended too, and its error is raised.
    """
    told = get_context("spawn").SimpleQueue()
    cpu = torch.device(device).type == "cpu"
    started = spawn(
        _member, (number, _free_port(), cpu, told, work, arguments), nprocs=number, join=False
    )
    assert started is not None
    try:
        ended = False
        while not ended:
            ended = started.join(timeout=_LISTEN_SECONDS)
            while not told.empty():
                hear(*told.get())
    finally:
        for process in started.processes:
            process.kill()
            process.join()


def _member(
    rank: int,
    number: int,
    port: int,
    cpu: bool,
    told: "SimpleQueue[tuple[Any, ...]]",
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """Join the group, and do its work; `rank` counts from 0."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from accelerate import Accelerator  # seconds, for those alone who train together

    group = Accelerator(cpu=cpu)
    work(*arguments, group, lambda *what: told.put(what))
    group.end_training()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
