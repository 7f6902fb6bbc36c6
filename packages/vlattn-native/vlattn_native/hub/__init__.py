"""The folder of Hugging Face's kernel hub, and what it has beside the kernels: `build` makes it of a clone of the repository.

In: the kernels of vlattn_fast and the modules that they import, the libraries of the CPU.
Out: build/hub/, which imports neither vlattn_fast nor this package.
Imports: vlattn_native, vlattn_fast.
"""
