"""The CUDA C++ kernels of csrc/cuda/: the library that is built from them, and a launcher per operator.

In: the checked arguments of an operator, as CUDA tensors.
Out: its outputs, or its gradients.
Imports: backends, backends.reference, _ground.
"""
