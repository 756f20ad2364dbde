"""AutoAugment's policy for CIFAR-10 (Cubuk et al., 2019), as torchvision has it."""

from torchvision.transforms import v2

from diffusemix_pipeline.training.augmentations import Augmentation, on_picture


def augmentation(classes: int) -> Augmentation:
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, v2.InterpolationMode.BILINEAR)
    return Augmentation(each=on_picture(policy))
