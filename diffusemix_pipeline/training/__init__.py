"""Dataset -> classifier: the arms that are compared, the loop that trains them, what lies on disk.

What does not belong here: judging a classifier on test images (evaluation), keeping runs and models
(tracking).
"""
