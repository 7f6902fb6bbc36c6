"""Triton kernels, one file per operator. Installed as `vlattn_fast.kernels`; the name `kernels` belongs to another package.

Nothing is imported here: an operator's table of backends loads its kernel, and with it triton, on first use.

In: the inputs of an operator, checked, as CUDA tensors.
Out: its outputs, or its gradients.
Imports: backends, backends.reference, _ground.
"""
