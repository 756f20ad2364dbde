"""Attacks: within their bounds, as the literature has them, each stronger than the one before."""

import numpy as np
import pytest
import torch
from torch import nn
from trained_digits import accuracy, digits, digits_model

from diffusemix_pipeline.evaluation.attacks import (
    autoattack_attacks,
    fgsm,
    gradient,
    pgd,
    standard_autoattack,
    survives_autoattack,
)


def attacked(model: nn.Module, images, labels, epsilon: float) -> dict[str, torch.Tensor]:
    """Return the images under FGSM, and under PGD from the middle of the ball."""
    slope, _ = gradient(model, images, labels)
    return {
        "fgsm": fgsm(images, slope, epsilon),
        "pgd": pgd(model, images, labels, epsilon, torch.zeros_like(images)),
    }


def toolbox(model: nn.Module, images, classes: int):
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255, 0.3])
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_no_pixel_moves_further_than_epsilon_or_out_of_range(attack, epsilon):
    images, labels = digits()[1]
    moved = attacked(digits_model(), images, labels, epsilon)[attack]
    assert moved.shape == images.shape
    assert moved.dtype == torch.float32
    assert (moved - images).abs().max() <= epsilon + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_a_trained_model_loses_accuracy_the_more_the_further():
    images, labels = digits()[1]
    model = digits_model()
    clean = accuracy(model, images, labels)
    weak, strong = (
        accuracy(model, attacked(model, images, labels, epsilon)["fgsm"], labels)
        for epsilon in (0.02, 0.15)
    )
    assert clean > 0.85
    assert clean > weak > strong
    noise = (images + 0.15 * torch.randn_like(images).sign()).clamp(0, 1)
    assert accuracy(model, noise, labels) > strong + 0.2  # the direction counts, not the length


def test_more_steps_are_a_stronger_attack_and_autoattack_the_strongest():
    images, labels = (part[:40] for part in digits()[1])
    model = digits_model()
    moved = attacked(model, images, labels, 0.1)
    weak, strong = (accuracy(model, moved[name], labels) for name in ("fgsm", "pgd"))
    survived = survives_autoattack(model, images, labels, 0.1, seed=0)
    assert weak > strong >= float(survived.float().mean())
    assert survived.dtype == torch.bool
    wrong = model(images).argmax(1) != labels
    assert not survived[wrong].any()


@pytest.mark.parametrize("epsilon", [2 / 255, 0.1])
def test_steps_are_those_of_the_robustness_toolbox(epsilon):
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch

    images, labels = (part[:30] for part in digits()[1])
    moved = attacked(digits_model(), images, labels, epsilon)
    estimator = toolbox(digits_model(), images, 10)
    one = FastGradientMethod(estimator, eps=epsilon, batch_size=30)
    many = ProjectedGradientDescentPyTorch(
        estimator,
        eps=epsilon,
        eps_step=epsilon / 4,
        max_iter=20,
        num_random_init=0,
        batch_size=30,
        verbose=False,
    )
    theirs = one.generate(images.numpy(), labels.numpy())
    assert np.abs(moved["fgsm"].numpy() - theirs).max() < 1e-6
    theirs = many.generate(images.numpy(), labels.numpy())
    # A gradient near zero may take either sign: nearly all pixels, and every answer, are the same.
    assert np.mean(np.abs(moved["pgd"].numpy() - theirs) < 1e-6) > 0.99
    model = digits_model()
    assert accuracy(model, moved["pgd"], labels) == accuracy(model, torch.tensor(theirs), labels)


def test_the_step_is_the_sign_of_the_gradient():
    """Of a linear model, the gradient is known: (softmax - one hot) times the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.rand(5, 3, 2, 2) * 0.8 + 0.1, torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        residual = model(images).softmax(1) - nn.functional.one_hot(labels, 3)
        expected = images + 0.05 * (residual @ model[1].weight).sign().view_as(images)
    assert torch.allclose(attacked(model, images, labels, 0.05)["fgsm"], expected, atol=1e-6)


def test_an_image_s_gradient_does_not_depend_on_its_neighbours():
    images, labels = digits()[1]
    model = digits_model()
    together, logits = gradient(model, images[:20], labels[:20])
    alone, _ = gradient(model, images[5:6], labels[5:6])
    assert torch.allclose(together[5], alone[0], atol=1e-6)
    assert torch.allclose(logits, model(images[:20]), atol=1e-5)


def test_pgd_starts_where_it_is_told():
    images, labels = (part[:10] for part in digits()[1])
    model = digits_model()
    starts = [torch.rand(images.shape, generator=torch.manual_seed(n)) * 2 - 1 for n in (0, 0, 1)]
    first, again, other = (pgd(model, images, labels, 0.1, start) for start in starts)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_autoattack_takes_few_classes(classes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).eval()
    images = torch.rand(6, 3, 4, 4)
    labels = model(images).argmax(1)
    with torch.no_grad():
        margins = model(images).sort(dim=1).values.diff(dim=1)[:, -1]
    survived = survives_autoattack(model, images, labels, 1e-4, seed=0)
    assert survived[margins > 0.05].all()
    assert not survives_autoattack(model, images, labels, 0.9, seed=0).any()
    assert autoattack_attacks(classes)[0] == "apgd-ce"
    assert ("apgd-t" in autoattack_attacks(classes)) == (classes >= 4)


def test_autoattack_is_the_packages_standard_version():
    from pyautoattack import AutoAttack

    model, device = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), torch.device("cpu")
    ours = standard_autoattack(model, 10, 0.1, 3, device)
    theirs = AutoAttack(model, eps=0.1, seed=3, device=device, version="standard")
    assert ours.attacks_to_run == theirs.attacks_to_run
    for attack in ("apgd", "apgd_targeted", "fab", "square"):
        simple = [
            {name: value for name, value in vars(getattr(one, attack)).items() if is_simple(value)}
            for one in (ours, theirs)
        ]
        assert simple[0] == simple[1]
        assert simple[0]["eps"] == 0.1


def is_simple(value) -> bool:
    return isinstance(value, int | float | str | None)


def test_autoattack_repeats_from_its_seed_and_leaves_the_generators_alone():
    images, labels = (part[:12] for part in digits()[1])
    model = digits_model()
    before = torch.get_rng_state()
    runs = [survives_autoattack(model, images, labels, 0.05, seed=7) for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
