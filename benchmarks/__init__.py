"""Benchmarks: one file per operator. Installed as `vlattn_fast.benchmarks`. `vlattn_lab` has those of whole tasks.

python -m vlattn_fast.benchmarks [names] [--device cuda] [--quick]     measure, print, append records to results/

In: names of benchmarks.
Out: records of times, memory and errors in results/.
Imports: measuring, checking, ops, dispatch, backends, scores, _ground.
"""
