"""A small classifier of scikit-learn's digits, trained once for all tests that judge one."""

from copy import deepcopy
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

SIDE = 16


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return train and test: images float32 (N, 3, 16, 16), whole 255ths in [0, 1], and labels."""
    bundled = load_digits()
    grey = torch.from_numpy(bundled.images).float()[:, None] / 16
    large = nn.functional.interpolate(grey, (SIDE, SIDE), mode="bilinear")
    images = (large.expand(-1, 3, -1, -1) * 255).round() / 255
    labels = torch.from_numpy(bundled.target).long()
    return (images[300:], labels[300:]), (images[:120], labels[:120])


def digits_model() -> nn.Module:
    """Return a fresh copy of the trained model: images in [0, 1] to logits (N, 10)."""
    return deepcopy(_trained())


@cache
def _trained() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        images, labels = digits()[0]
        for _ in range(4):
            for batch in torch.randperm(len(images)).split(64):
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model.eval()(images).argmax(1) == labels).float().mean())
