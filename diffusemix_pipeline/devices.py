"""Which device heavy work runs on, what it is fast at, and how many processor cores there are."""

import os


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
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
