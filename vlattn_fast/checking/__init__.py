"""Checks of the operators on this machine: `vlattn verify`, also with `--fuzz`, and `vlattn info`.

In: names of operators and backends.
Out: errors as multiples of what the tolerance rule allows.
Imports: checking.cases, ops, dispatch, backends, scores, _ground.
"""
