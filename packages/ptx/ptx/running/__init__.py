"""Launches of kernels that are read: a program is loaded, launched on copies of tensors, and reported on.

In: an encoded kernel, tensors, a grid.
Out: a `Launch`: counts, and findings with their places.
Imports: ptx.reading.
"""
