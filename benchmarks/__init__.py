"""Benchmarks: one file per operator and one per whole task. Installed as `vlattn_fast.benchmarks`.

python -m vlattn_fast.benchmarks [names] [--device cuda] [--quick]     measure, print, append records to results/
python -m vlattn_fast.benchmarks host                                  what Python adds to a call, by pytest-benchmark

In: names of benchmarks.
Out: records of times, memory and errors in results/.
Imports: measuring, checking, nn, interpret, ops, dispatch, backends, scores, _ground.
"""
