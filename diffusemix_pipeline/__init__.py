"""DiffuseMix as a pipeline: edit, mix, train and judge, with every image traceable to its source.

The packages, from the top down; imports run one way and `tests/test_architecture.py` holds it:
`definitions, cli -> orchestration -> bundled_editor, tracking, versioning -> evaluation
-> training -> mixing -> editing -> datasets -> settings`, and at the bottom the small
modules that know nothing of the pipeline.
"""
