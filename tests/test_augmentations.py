"""Rival augmentations: what each changes, what it leaves, and that a seed repeats it."""

import numpy as np
import pytest
import torch
from conftest import quick_settings
from PIL import Image

from diffusemix_pipeline.mixing.blending import mix
from diffusemix_pipeline.mixing.masks import half_mask
from diffusemix_pipeline.training import augmentations
from diffusemix_pipeline.training.augmentations import Augmentation
from diffusemix_pipeline.training.data import DecodedImages, LabelledImages
from diffusemix_pipeline.training.loop import _Batches

SIDE = 32
FRACTALS = list(np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8))
OF_ONE_IMAGE = {
    "trivialaugment": augmentations.trivialaugment(),
    "randaugment": augmentations.randaugment(),
    "augmix": augmentations.augmix(),
    "pixmix": augmentations.pixmix(FRACTALS),
}
OF_A_BATCH = {"mixup": augmentations.mixup(4), "cutmix": augmentations.cutmix(4)}


def smooth(seed: int) -> np.ndarray:
    """Return an image uint8 (SIDE, SIDE, 3) of a few waves."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = [np.sin(6 * x + seed), np.cos(5 * y + seed), np.sin(9 * x * y + seed)]
    return np.stack([120 + 100 * wave for wave in waves], axis=2).astype(np.uint8)


def batches(augmentation: Augmentation, tmp_path, *, seed: int = 0) -> _Batches:
    images = np.stack([smooth(n) for n in range(24)])
    decoded = DecodedImages(images, SIDE, tmp_path)
    data = LabelledImages(decoded, np.arange(24) % 4, [str(n) for n in range(24)])
    training = quick_settings("training.batch_size=16", "training.crop_padding=0").training
    return _Batches(data, training.model_copy(update={"flip": False}), augmentation, seed)


@pytest.mark.parametrize("name", OF_ONE_IMAGE)
def test_an_image_is_changed_now_and_then_by_much_and_stays_an_image(name, tmp_path):
    plain, changed = batches(augmentations.NONE, tmp_path), batches(OF_ONE_IMAGE[name], tmp_path)
    distances = []
    for step in range(8):
        before, labels = plain[step]
        after, same_labels = changed[step]
        assert torch.equal(labels, same_labels)
        assert after.dtype == torch.uint8
        assert after.shape == before.shape
        distances += (before.float() - after.float()).abs().mean(dim=(1, 2, 3)).tolist()
    assert np.mean(distances) > 5
    assert np.median(distances) < 100


@pytest.mark.parametrize("name", OF_ONE_IMAGE)
def test_a_step_is_the_same_whenever_and_by_whom_it_is_made(name, tmp_path):
    augmentation = OF_ONE_IMAGE[name]
    one, other = batches(augmentation, tmp_path), batches(augmentation, tmp_path)
    later = [one[step][0] for step in range(4)][3]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(other[3][0], later)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's draws are moved
    assert not torch.equal(batches(augmentation, tmp_path, seed=1)[3][0], later)


@pytest.mark.parametrize("name", OF_A_BATCH)
def test_mixed_labels_are_probabilities_of_the_mixed_images(name):
    torch.manual_seed(0)
    values = torch.arange(4) / 4
    images = values.view(4, 1, 1, 1).expand(4, 3, SIDE, SIDE)  # an image's mean tells its label
    shares = []
    for _ in range(20):
        mixed, labels = OF_A_BATCH[name].batch(images, torch.arange(4))
        assert torch.allclose(labels.sum(1), torch.ones(4))
        assert torch.allclose(mixed.mean(dim=(1, 2, 3)), labels @ values, atol=1e-5)
        shares.append(float(labels.max(1).values.mean()))
    assert min(shares) < 0.95 < max(shares) + 0.05


def test_pixmix_turns_and_shears_smoothly():
    """Bilinearly: an edge between black and white turns grey."""
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:16, 16:] = halves[16:, :16] = 255
    rotated_and_sheared = augmentations._PIXMIX_OPERATIONS[4:7]
    for change in rotated_and_sheared:
        moved = np.asarray(change(Image.fromarray(halves), 0.23))
        assert len(np.unique(moved)) > 3


def test_pixmix_with_no_round_keeps_or_changes_the_image_itself():
    rng = np.random.default_rng(0)
    image = smooth(0)
    torch.manual_seed(0)
    results = [OF_ONE_IMAGE["pixmix"].each(image, rng) for _ in range(200)]
    kept = sum(np.array_equal(result, image) for result in results)
    assert 200 / 10 * 0.4 < kept < 200 / 10 * 1.8  # one in two times five


def test_edits_are_mixed_anew_with_their_own_originals():
    originals = np.stack([smooth(n) for n in range(3)])
    edits = 255 - originals[[2, 0]]
    images = np.concatenate([originals, edits])
    masks = [half_mask(name, SIDE, SIDE) for name in ("left", "top")]
    augmentation = augmentations.diffusemix_redrawn(images, np.array([2, 0]), masks, FRACTALS, 0.2)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        places = np.array([1, 4, 3])
        redrawn = augmentation.redraw(places, images[places], rng)
        assert np.array_equal(redrawn[0], originals[1])  # an original stays as it is
        for row, source in ((1, 0), (2, 2)):
            found = [
                (m, f)
                for m, mask in enumerate(masks)
                for f, fractal in enumerate(FRACTALS)
                if np.array_equal(
                    redrawn[row],
                    mix(originals[source], 255 - originals[source], mask, fractal, 0.2),
                )
            ]
            assert len(found) == 1
            seen.add((row, *found[0]))
    assert len(seen) == 2 * 2 * 3
    assert np.array_equal(images[3:], edits)  # what is read stays as it is
