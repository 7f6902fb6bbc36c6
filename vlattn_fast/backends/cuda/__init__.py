"""The CUDA C++ kernels of csrc/cuda/: the library that is built from them, and a launcher per operator.

In: the inputs of an operator, checked, as CUDA tensors.
Out: its outputs, or its gradients.
Imports: backends, backends.reference, _ground.
"""
