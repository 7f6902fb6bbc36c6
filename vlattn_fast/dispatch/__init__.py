"""How a call finds its kernel, for all operators.

`call` describes a call, `limits` says what a backend does not support, `table` lists an operator's backends, and `choice` picks
one.

In: the metadata of a call's arguments; the limits of an operator's kernels.
Out: the name of a backend; its functions.
Imports: backends, scores, _ground.
"""
