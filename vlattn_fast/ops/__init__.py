"""The operators, and the one table of them.

Every module here has an operator's name. The module holds the public call of that name, `BACKENDS` (name to `Backend`, in the
order in which "auto" takes them) and `describe_call(**arguments)`, which checks the arguments of the public call and returns the
`Call` that describes them to backends.

In: the arguments of a public call.
Out: its result, differentiable.
Imports: backends, kernels, scores, _ground.
"""

from vlattn_fast.ops import (
    attention_map,
    attention_statistics,
    congruence_loss,
    relevancy_attention,
    score_attention,
    stacked_cross_attention,
)
from vlattn_fast.ops._dispatch import BACKEND_NAMES

_MODULES = score_attention, relevancy_attention, attention_map, attention_statistics, congruence_loss, stacked_cross_attention
OPERATORS = {module.__name__.rpartition(".")[2]: module for module in _MODULES}

__all__ = ["BACKEND_NAMES", "OPERATORS"]
