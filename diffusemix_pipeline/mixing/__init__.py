"""Mixing: an original, its edit and a fractal become one augmented image.

What belongs here: the half masks, the fractals, the two equations, and the stages that walk a
dataset with them. What does not: making edits (`editing`) and anything that needs torch.
"""
