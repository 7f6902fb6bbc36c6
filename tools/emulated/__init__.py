"""The package's kernels for GPUs on CPU tensors: `ptx` emulates their launches, and here the package is told so, from outside.

    VLATTN_PTX=90 python -m tools.emulated verify --backend triton     # any command of `vlattn`

`triton` and `cuda` do it for a backend and a while, `package` for both.
"""
