"""Adversarial attacks on a classifier. What does not belong here: counting their successes."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Move each pixel by `epsilon` against the true label: the fast gradient sign method.

    `images` are float32 (N, 3, H, W) in [0, 1], `labels` int64 (N,); `model` takes such images,
    however it normalises them, and gives logits (N, classes). `epsilon` in (0, 1] bounds the
    L-infinity distance. Returns images of the same shape, range and device. The model is left in
    the mode and on the device that it came in, with no gradients.

    Source: Goodfellow et al., Explaining and Harnessing Adversarial Examples (2015), section 4.
    """
    # Imported here, as it takes seconds that a reader of finished evidence should not pay.
    from art.attacks.evasion import FastGradientMethod
    from art.estimators.classification import PyTorchClassifier

    device, was_training = images.device, model.training
    with torch.no_grad():
        classes = model.eval()(images[:1]).shape[1]
    try:
        # The toolbox works on the current CUDA device, or on the CPU.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            classifier = PyTorchClassifier(
                model=model,
                loss=nn.CrossEntropyLoss(),
                input_shape=tuple(images.shape[1:]),
                nb_classes=classes,
                clip_values=(0.0, 1.0),
                device_type="gpu" if device.type == "cuda" else "cpu",
            )
            attack = FastGradientMethod(classifier, eps=epsilon, batch_size=len(images))
            moved = attack.generate(images.cpu().numpy(), labels.cpu().numpy())
    finally:
        model.to(device).train(was_training)
        model.zero_grad(set_to_none=True)
    return torch.from_numpy(moved).to(device)
