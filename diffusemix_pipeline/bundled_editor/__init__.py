"""The small InstructPix2Pix that the project trains and ships, so that everything runs offline.

What belongs here: the procedural edits that it learns (`teachers`), the pictures that it learns
them on (`sources`), its training (`training`), its figures (`evaluation`) and the trained pipeline
folder (`weights/`, an ordinary diffusers folder with its model card).

What does not: anything that loads or runs an editor for a dataset. The folder in `weights/` is
loaded by `StableDiffusionInstructPix2PixPipeline.from_pretrained` like any other checkpoint. How it
was made matters to nothing that makes or uses edits: the report alone tells of it.
"""
