"""Several processes that train one model together, a device each (DistributedDataParallel).

What belongs here: starting them, hearing from them, and ending them. What does not: training.
Nothing listens on a network: they meet in a file, and talk over the loopback interface.
"""

import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import get_context, spawn

_LISTEN_SECONDS = 0.2
_LONGEST_WAIT = timedelta(days=1)  # of the others, while the first validates

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

    `work` is a function of a module, and what it is given can be pickled; the first process alone
    may tell. Returns when all have ended; where one fails, the others are ended too, and its error
    is raised.
    """
    heard, tells = get_context("spawn").Pipe(duplex=False)
    cpu = torch.device(device).type == "cpu"
    with tempfile.TemporaryDirectory() as meeting, heard:
        member = (number, Path(meeting) / "group", cpu, tells, work, arguments)
        started = spawn(_member, member, nprocs=number, join=False)
        assert started is not None
        try:
            tells.close()  # what a killed process was telling then ends, as nobody else could go on
            ended = False
            while not ended:
                ended = started.join(timeout=_LISTEN_SECONDS)
                _pass_on(heard, hear)
        finally:
            for process in started.processes:
                process.kill()
                process.join()


def _pass_on(heard: Connection, hear: Callable[..., None]) -> None:
    while heard.poll():
        try:
            told = heard.recv()
        except EOFError:  # nobody is left to tell
            return
        hear(*told)


def _member(
    rank: int,
    number: int,
    meeting: Path,
    cpu: bool,
    tells: Connection,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """Join the group, and do its work; `rank` counts from 0."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }
    if rank:
        tells.close()
    if not cpu:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "gloo" if cpu else "nccl",
        store=distributed.FileStore(str(meeting), number),
        rank=rank,
        world_size=number,
        timeout=_LONGEST_WAIT,
    )
    from accelerate import Accelerator  # seconds, for those alone who train together

    group = Accelerator(cpu=cpu)
    work(*arguments, group, lambda *what: tells.send(what))
    group.end_training()
