"""Which device heavy work runs on."""


def choose_device(device: str) -> str:
    """Resolve 'auto' to the best device that is here: cuda, mps or cpu."""
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
