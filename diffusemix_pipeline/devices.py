"""Which device heavy work runs on, and how many processor cores there are for it."""

import os


def choose_device(device: str) -> str:
    """Resolve 'auto' to the best device that is here: cuda, mps or cpu."""
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_cores() -> int:
    """Return how many processor cores this process may use, which in a container can be few."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
