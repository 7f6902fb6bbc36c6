"""Trained models and photos that packages of the registry carry, explained, evaluated and drawn.

`python -m vlattn_lab.real` writes rows to benchmarks/results/real.json, pictures to docs/ and docs/experiments/real.md from
the rows. `python -m tools.environments real` makes its environment first.

In: names of parts.
Out: rows, pictures and a page.
Imports: vlattn_lab.
"""
