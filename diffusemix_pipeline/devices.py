"""Which device heavy work runs on, what it is fast at, and how many processor cores there are."""

import os
import sys
from pathlib import Path

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # cgroup 2


def choose_device(device: str) -> str:
    """Resolve 'auto' to the best device that is here: cuda, mps or cpu."""
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def count_gpus() -> int:
    """Return how many CUDA devices this process may use."""
    import torch

    return torch.cuda.device_count()


def is_fast_at_bfloat16(device: str) -> bool:
    """Say whether bfloat16 pays: on CUDA, and on processors with instructions for it."""
    import torch

    if torch.device(device).type != "cpu":
        return torch.device(device).type == "cuda"
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def usable_cores() -> int:
    """Return how many processor cores this process may use, which in a container can be few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _cores_of_container())


def _cores_of_container() -> int:
    """Return how many cores' time Linux gives to this container; very many without a limit."""
    if not _CONTAINER_LIMIT.exists():
        return sys.maxsize
    most, period = _CONTAINER_LIMIT.read_text().split()
    return sys.maxsize if most == "max" else max(1, round(int(most) / int(period)))
