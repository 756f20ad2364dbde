"""Labelled images: sources, what is refused, splits, and how a stage's folder lies on disk.

What does not belong here: making new images (editing, mixing) and feeding a network (training).
"""
