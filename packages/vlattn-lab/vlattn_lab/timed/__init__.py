"""Benchmarks of whole tasks, one file each. On a CPU each variant of the longest tasks has a process of its own.

python -m vlattn_fast.benchmarks task_explain_models     finds them by the entry points of this package

In: sizes.
Out: variants that `vlattn_fast.benchmarks` times.
Imports: nothing.
"""
