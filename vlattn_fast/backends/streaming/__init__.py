"""The operators in plain PyTorch, tile by tile, in O(N) memory on any device.

In: the checked arguments of an operator.
Out: its outputs, or its gradients.
Imports: backends.reference, _ground.
"""
