"""The recipe table: which optimiser suits which model, where the settings leave it open.

It lies below `training`, for edits are known by the recipe of the classifiers that judge them.
"""

from fnmatch import fnmatch
from typing import Any, NamedTuple

from diffusemix_pipeline.settings import Optimizer, Training

_PRETRAINED = 0.1  # of the learning rate from nothing


class Recipe(NamedTuple):
    """An optimiser, its peak learning rate and its weight decay."""

    optimizer: Optimizer
    learning_rate: float
    weight_decay: float


# By the model's name; the first pattern that fits. SGD's rates are for 256 images a step.
_RECIPES = {
    # What the paper's baselines were trained with on CIFAR-100, as GuidedMixup's code has it.
    "preact_resnet18": Recipe("sgd", 0.2, 1e-4),
    # The small models of this project's own samples.
    "resnet10t": Recipe("adamw", 2e-3, 0.05),
    # The authors' script for Stanford Cars: 0.025 with 64 images.
    "resnet[0-9]*": Recipe("sgd", 0.1, 5e-4),
    # Ours: the paper's is not known.
    "vit_*": Recipe("adamw", 5e-4, 0.05),
    "deit*": Recipe("adamw", 5e-4, 0.05),
    "*": Recipe("adamw", 2e-3, 0.05),
}


def recipe_of(training: Training) -> Recipe:
    """Return what `training` says, and from the table by its model what it leaves open."""
    model = training.model.partition(".")[0]  # what follows tells timm's weights apart
    suited = next(recipe for name, recipe in _RECIPES.items() if fnmatch(model, name))
    optimizer = training.optimizer or suited.optimizer
    if optimizer != suited.optimizer:  # the table's rates are of its own optimiser
        suited = _RECIPES["resnet[0-9]*" if optimizer == "sgd" else "*"]
    rate = suited.learning_rate * (training.batch_size / 256 if optimizer == "sgd" else 1)
    rate *= _PRETRAINED if training.pretrained else 1
    given, decay = training.learning_rate, training.weight_decay
    return Recipe(
        optimizer,
        rate if given is None else given,
        suited.weight_decay if decay is None else decay,
    )


def training_identity(training: Training) -> dict[str, Any]:
    """Return what tells one training from another: `training`, with what it leaves open filled in.

    Without what is asked of several trainings: which arms, seeds and numbers of images. How a batch
    is divided counts, for batch norm sees one part at a time.
    """
    unsaid = {name for name in ("processes", "accumulate") if getattr(training, name) == 1}
    unsaid |= set() if training.pretrained else {"revision"}
    said = training.model_dump(exclude={"arms", "seeds", "few_images", *unsaid})
    return {**said, **recipe_of(training)._asdict()}
