"""Scenario: what the plug-in refuses by an engine's configuration, while requests that do not ask go on; layers of GPUs."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.helpers.tiny import engine, prompts, sampling, saved
from vlattn_vllm import front, worker

GUESSES = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


def main(kind: str) -> None:
    if kind == "guesses":  # an engine that guesses ahead leaves no second one to its process
        with mock.patch.object(logging.getLogger("vllm.vlattn"), "warning") as warned:
            llm = engine(saved(), speculative_config=GUESSES)
        (line,) = warned.call_args_list
        assert "tokens are guessed ahead (speculative decoding)" in line.args[0] % line.args[1:]
        refused(llm, "tokens are guessed ahead")
        return
    llm = engine(saved())
    with mock.patch.dict(os.environ, VLATTN_MAX_ASKS="0"):
        refused(llm, "turned off at this server (--vlattn-max-asks 0)")
    config = llm.llm_engine.vllm_config
    assert not front.refusals(config)
    quantised = replaced(config, cache_config=replaced(config.cache_config, cache_dtype="fp8"))  # which the CPU does not run
    with mock.patch.object(llm.llm_engine.input_processor, "vllm_config", quantised):
        refused(llm, "the cache is quantised (kv_cache_dtype=fp8)")
    halves = replaced(config, parallel_config=replaced(config.parallel_config, enable_dbo=True))  # which CPUs have not
    with mock.patch.object(llm.llm_engine.input_processor, "vllm_config", halves):
        refused(llm, "a batch runs in two halves, in other threads (dual-batch overlap)")
    on_gpus(config)


def refused(llm: Any, words: str) -> None:
    """A request that asks; one that does not ask goes on."""
    (prompt,) = prompts(12)
    with pytest.raises(ValueError, match=re.escape(words)):
        llm.generate(prompt, sampling(2, {}), use_tqdm=False)
    assert len(llm.generate(prompt, sampling(2), use_tqdm=False)[0].outputs[0].token_ids) == 2


def on_gpus(config: Any) -> None:
    """Nothing is refused, a batch that asks runs without full CUDA graphs, and the layers take what `worker` hands on."""
    from vllm import platforms
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

    with mock.patch.object(platforms, "_current_platform", SimpleNamespace(device_type="cuda", is_rocm=lambda: False)):
        assert not front.refusals(config)
        quantised = replaced(config.compilation_config.pass_config, fuse_attn_quant=True)
        fused = replaced(config, compilation_config=replaced(config.compilation_config, pass_config=quantised))
        assert not front.refusals(fused) and not front._request_refusals(fused, sampling(2, {}), False)
        (reason,) = front._request_refusals(fused, sampling(2, {"steer": [{"heads": 0, "weight": 0}]}), False)
        assert "fuse_attn_quant=False" in reason
    with mock.patch.object(platforms, "_current_platform", SimpleNamespace(device_type="xpu", is_rocm=lambda: False)):
        assert "'xpu'" in front.refusals(config)[0]
    for v2 in (False, True):
        worker.install("cuda", v2)  # each class is there, and has the method
    compiled = {"mode": CompilationMode.VLLM_COMPILE, "cudagraph_capture_sizes": [1, 2, 4], "max_cudagraph_capture_size": 4}
    compiled["splitting_ops"] = [*config.compilation_config._attention_ops]
    for mode, silent, asked in (
        ("FULL_AND_PIECEWISE", "FULL", "PIECEWISE"),
        ("PIECEWISE", "PIECEWISE", "PIECEWISE"),
        ("FULL", "FULL", "NONE"),
        ("FULL_DECODE_ONLY", "FULL", "NONE"),
    ):
        graphs = replaced(config.compilation_config, cudagraph_mode=CUDAGraphMode[mode], **compiled)
        dispatcher = CudagraphDispatcher(replaced(config, compilation_config=graphs))
        dispatcher.initialize_cudagraph_keys(CUDAGraphMode[mode])
        modes = []
        for step in (None, object()):
            worker._NOW.step = step
            modes.append(dispatcher.dispatch(num_tokens=3, uniform_decode=True)[0].name)
        worker._NOW.step = None
        assert modes == [silent, asked], (mode, modes)
    for modes_there, asked in ((("FULL", "PIECEWISE"), "PIECEWISE"), (("FULL",), "NONE")):
        manager = object.__new__(CudaGraphManager)
        graphs = [BatchExecutionDescriptor(CUDAGraphMode[mode], num_tokens=4, num_reqs=None) for mode in modes_there]
        vars(manager).update(_graphs_captured=True, _candidates={(3, 0): graphs}, _resolve_effective_loras=lambda loras: loras)
        modes = []
        for step in (None, object(), None):
            worker._NOW.step = step
            modes.append(manager.dispatch(3, 3, 1, num_active_loras=0).cg_mode.name)
        assert modes == ["FULL", asked, "FULL"], modes


def replaced(config: Any, **fields: Any) -> Any:
    """A configuration with other fields, which vLLM would check."""
    changed = copy.copy(config)
    for name, value in fields.items():
        object.__setattr__(changed, name, value)
    return changed


if __name__ == "__main__":
    main(sys.argv[1])
