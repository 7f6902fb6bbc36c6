"""Probes of heads and states over a data set."""

from vlattn_fast.interpret.probing.report import ProbeReport
from vlattn_fast.interpret.probing.run import probe

__all__ = ["ProbeReport", "probe"]
