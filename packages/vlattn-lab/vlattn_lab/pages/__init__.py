"""The pages of docs/ whose tables are stored rows.

In: files of benchmarks/results/.
Out: docs/evaluation.md and docs/guides/which_method.md with their tables.
Imports: vlattn_lab.
"""
