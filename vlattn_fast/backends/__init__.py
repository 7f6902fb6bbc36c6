"""The backends of the operators: each folder has one file an operator with the functions `forward` and `backward`.

In: the checked arguments of an operator. Out: its outputs or gradients. `native` calls the libraries of C++ kernels.
Imports scores and the ground.
"""
