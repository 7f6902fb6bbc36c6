"""Attention statistics of a served model: a plug-in of vLLM.

A request with `SamplingParams(extra_args={"vlattn": {...}})` gets, with each generated token, the statistics of the attention
that chose it. vLLM schedules, batches and shards as always; after its own attention, the operator reads the keys of such requests
in the paged cache. vLLM finds the plug-in by its entry point; nothing is imported from it before.

In: requests, and the queries and paged keys of a running engine.
Out: `Attention` on each completion; a folder of them from `collect`.
Imports: vlattn_fast, vlattn_fast._ground.checks, vlattn_fast._ground.extras, vlattn_fast.interpret.dataset.store.
"""

from vlattn_vllm.attention import Answer, Attention
from vlattn_vllm.collecting import Answers, collect, load

__all__ = ["Answer", "Answers", "Attention", "collect", "load"]
