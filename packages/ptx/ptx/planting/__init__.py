"""Faults for kernels: what is changed in a line of PTX or in a node of a source, and what a kernel's paths say of the change.

In: lines of PTX and nodes of Triton's sources; programs.
Out: changed lines and sources; whether a barrier, a wait, a commit or a fence is needless there.
Imports: ptx.reading, ptx.running.
"""
