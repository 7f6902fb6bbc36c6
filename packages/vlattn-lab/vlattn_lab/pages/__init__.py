"""The pages of docs/ whose tables are stored rows.

In: files of benchmarks/results/.
Out: docs/evaluation.md and a section of docs/guides/which_method.md.
Imports: vlattn_lab.
"""
