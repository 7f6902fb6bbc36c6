"""Trained models and photos that packages of the registry carry, explained, evaluated and drawn.

`python -m vlattn_lab.real` writes rows to benchmarks/results/real.json and pictures to docs/. docs/experiments/real_tables.md
is made of the rows with the site. `python -m tools.environments real` makes its environment first.

In: names of parts.
Out: rows, pictures and the page of all measurements.
Imports: vlattn_lab, vlattn_lab.experiments.
"""
