"""The kernels of vlattn_fast for those who ship them: compiled ahead of their first call, and for processes without Python.

Nothing is imported here. `building` makes the libraries of csrc/, in a clone or for a wheel.

In: a clone of the repository; for a launch, its kernel and arguments.
Out: libvlattn_torch.so.
Imports: nothing.
"""
