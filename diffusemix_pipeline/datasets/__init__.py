"""Labelled images: where they come from, what is refused, how they are split, and how a stage's folder lies on disk.

What does not belong here: making new images (editing, mixing) and feeding a network (training).
"""
