"""How a call finds its kernel, for all operators.

`call` describes a call, `limits` says what a backend refuses, `table` lists an operator's backends, `choice` picks one, `loading`
imports it.

In: the arguments of a call, as facts; the limits of an operator's kernels.
Out: the name of a backend; its functions.
Imports: backends, kernels, scores, _ground.
"""
