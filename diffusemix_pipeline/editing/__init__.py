"""Image + prompt -> edit: which are wanted, the model that makes them, the store that keeps them.

What does not belong here: what is done with an edit afterwards (mixing), and how the bundled model
was trained (bundled_editor).
"""
