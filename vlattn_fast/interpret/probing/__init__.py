"""`probe`: what heads attend to, and which information hidden states hold, over a data set.

In: a model and labelled samples.
Out: a `ProbeReport`.
Imports: interpret.explaining, interpret.adapters, interpret.result, attach, ops, _ground.
"""

from vlattn_fast.interpret.probing.probe_dataset import probe
from vlattn_fast.interpret.probing.report import ProbeReport

__all__ = ["ProbeReport", "probe"]
