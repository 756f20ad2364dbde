"""Promise: the product's loader is the real checkpoint's loader."""

import numpy as np
import pytest
from conftest import picture, quick_settings

from benchmarks.real_size import write_editor
from diffusemix_pipeline.datasets.images import to_square
from diffusemix_pipeline.editing.editor import load_editor, locate_editor


@pytest.mark.slow
def test_a_pipeline_of_the_real_configuration_loads_and_edits(tmp_path):
    """The sizes of timbrooks/instruct-pix2pix, random weights: about 4 GB of them."""
    write_editor(tmp_path)
    settings = quick_settings(
        "size=256",
        "editing.steps=2",
        "editing.batch_size=1",
        "editing.sampler=euler_ancestral",
        "editing.guidance=4",
        "editing.image_guidance=1.5",
    )
    editor = load_editor(locate_editor(str(tmp_path), None), settings.editing, "cpu")
    assert sum(p.numel() for p in editor._unet.parameters()) == pytest.approx(859.5e6, rel=1e-3)
    image = to_square(picture(0, (300, 260)), 256)
    edit = editor.edit(image[None], ["A transformed version of image into sunset"], [0])
    assert edit.shape == (1, 256, 256, 3)
    assert edit.dtype == np.uint8
    assert edit.std() > 0
