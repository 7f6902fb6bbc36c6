"""The CUDA C++ kernels of csrc/cuda/: the library that is built from them, and an operator a file in front of it."""
