"""The pages of docs/ whose tables are stored rows.

In: files of benchmarks/results/, and what vlattn_lab.model_classes stores.
Out: docs/evaluation.md, docs/models.md and docs/guides/which_method.md with their tables.
Imports: vlattn_lab, vlattn_lab.model_classes.
"""
