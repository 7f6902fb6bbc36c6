"""The operators in plain PyTorch, tile by tile, in O(N) memory on any device.

In: the inputs of an operator, checked.
Out: its outputs, or its gradients.
Imports: backends, backends.reference, _ground.
"""
