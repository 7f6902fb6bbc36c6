"""The backends of the operators: a folder each, with a file for each operator that has the functions `forward` and `backward`.

In: the inputs of an operator, checked, as its NamedTuple.
Out: its outputs, or its gradients. `native` calls the libraries of C++ kernels.
Imports: nothing.
"""
