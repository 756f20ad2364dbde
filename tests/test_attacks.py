"""FGSM: within its bound, the textbook step, harmful to a trained model, and tidy afterwards."""

import pytest
import torch
from torch import nn
from trained_digits import accuracy, digits, digits_model

from diffusemix_pipeline.evaluation.attacks import fgsm


@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255, 0.3])
def test_no_pixel_moves_further_than_epsilon_or_out_of_range(epsilon):
    images, labels = digits()[1]
    moved = fgsm(digits_model(), images, labels, epsilon)
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
        accuracy(model, fgsm(model, images, labels, epsilon), labels) for epsilon in (0.02, 0.15)
    )
    assert clean > 0.85
    assert clean > weak > strong
    noise = (images + 0.15 * torch.randn_like(images).sign()).clamp(0, 1)
    assert accuracy(model, noise, labels) > strong + 0.2  # the direction counts, not the length


def test_the_step_is_the_sign_of_the_gradient():
    """Of a linear model, the gradient is known: (softmax - one hot) times the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.rand(5, 3, 2, 2) * 0.8 + 0.1, torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        residual = model(images).softmax(1) - nn.functional.one_hot(labels, 3)
        expected = images + 0.05 * (residual @ model[1].weight).sign().view_as(images)
    assert torch.allclose(fgsm(model, images, labels, 0.05), expected, atol=1e-6)


def test_two_classes_work():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 1, 0])
    loss = nn.CrossEntropyLoss()
    moved = fgsm(model, images, labels, 0.1)
    assert loss(model(moved), labels) > loss(model(images), labels)


def test_the_model_stays_as_it_was():
    images, labels = digits()[1]
    model = digits_model()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same = fgsm(model, images[:8], labels[:8], 0.1)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(same, fgsm(model.eval(), images[:8], labels[:8], 0.1))
