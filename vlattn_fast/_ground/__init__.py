"""The ground: argument checks, helpers on tensors, optional packages, the sine series.

In: arguments as users passed them, tensors.
Out: the same, checked or reshaped.
Imports: nothing.
"""
