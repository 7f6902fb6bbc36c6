"""The ground: argument checks, helpers on tensors, marks on them, hooks of modules, optional packages, the sine series,
devices and versions.

In: arguments as users passed them, tensors.
Out: the same, checked or reshaped.
Imports: nothing.
"""
