"""Adversarial attacks on a classifier. What does not belong here: counting their successes.

All are white-box and bounded in L-infinity. A `model` takes float32 (N, 3, H, W) images in [0, 1],
however it normalises them, and gives logits (N, K); it is in evaluation mode. `labels` are int64
(N,); `epsilon` in (0, 1] bounds how far a pixel moves.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from pyautoattack import AutoAttack

PGD_STEPS = 20
_PGD_STEP = 0.25  # of epsilon
_AUTOATTACK_TARGETS = 9
_LEAST_CLASSES = 4  # that AutoAttack's targeted loss is defined for


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy's gradient by each pixel, and the logits, of one forward pass."""
    images = images.detach().requires_grad_()
    logits = model(images)
    # A sum, so that an image's gradient does not depend on how many others there are.
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return torch.autograd.grad(loss, images)[0], logits.detach()


def fgsm(images: Tensor, slope: Tensor, epsilon: float) -> Tensor:
    """Move each pixel by `epsilon` along `slope`, of `gradient`: the fast gradient sign method.

    Source: Goodfellow et al., Explaining and Harnessing Adversarial Examples (2015), section 4.
    """
    return (images + epsilon * slope.sign()).clamp(0, 1)


def pgd(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, start: Tensor) -> Tensor:
    """Take 20 steps of epsilon / 4 from `start`, each back into the ball and the range of pixels.

    `start`, float (N, 3, H, W) in [-1, 1], is where in the ball each image begins.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks (2018).
    """
    low, high = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
    moved = (images + epsilon * start).clamp(0, 1)
    for _ in range(PGD_STEPS):
        slope, _ = gradient(model, moved, labels)
        moved = (moved + _PGD_STEP * epsilon * slope.sign()).clamp(low, high)
    return moved


def standard_autoattack(
    model: nn.Module, classes: int, epsilon: float, seed: int, device: torch.device
) -> "AutoAttack":
    """Return the standard AutoAttack, as far as so many classes have targets for it."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(
        model,
        eps=epsilon,
        seed=seed % 2**32,
        device=device,
        version="custom",
        attacks=list(autoattack_attacks(classes)),
    )
    targets = min(_AUTOATTACK_TARGETS, classes - 1)
    # The standard version's settings, which the package makes only for its own list of attacks.
    attack.apgd.n_restarts = attack.fab.n_restarts = attack.apgd_targeted.n_restarts = 1
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
    return attack


def survives_autoattack(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, seed: int
) -> Tensor:
    """Return bool (N,): which images no attack of the standard AutoAttack turns.

    The draws follow from `seed` and from all N images together. With K < 10 classes there are K - 1
    targets in place of nine; with fewer than four, targeted APGD, whose loss needs four, is left
    out (`autoattack_attacks` says what is run).

    Source: Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks (2020); by pyautoattack, the authors' code as a package.
    """
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    attack = standard_autoattack(model, classes, epsilon, seed, images.device)
    cuda = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # the package seeds torch's own generators
        moved, _ = attack.run_standard_evaluation(
            images.contiguous(), labels, batch_size=len(images)
        )
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        return model(moved).argmax(1) == labels


def autoattack_attacks(classes: int) -> Sequence[str]:
    """Return the attacks of the ensemble for that many classes: the standard four, but for few."""
    if classes < _LEAST_CLASSES:
        return ("apgd-ce", "fab-t", "square")
    return ("apgd-ce", "apgd-t", "fab-t", "square")
