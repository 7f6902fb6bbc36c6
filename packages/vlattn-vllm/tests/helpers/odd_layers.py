"""Scenario: models whose layers are not alike. Asks that name layers without attention, with chunks or with other heads are
refused; others of the batch are answered, and those that do not ask get the tokens that they get alone."""

from __future__ import annotations

from tests.helpers.tiny import Maps, close, engine, everything, prompts, sampling, saved

# isort: split
from typing import Any
from unittest import mock

import torch

from vlattn_vllm import worker

CUT = [{"keys": [0, 4], "weight": 0}]
LENGTHS = 70, 90, 20


def main() -> None:
    chunks()
    heads()
    no_attention()


def answered(llm: Any, *asks: Any) -> list[Any]:
    """The completions of one batch, whose last request asks for nothing."""
    some = prompts(*LENGTHS)
    alone = llm.generate(some, sampling(6), use_tqdm=False)
    outputs = llm.generate(some, [sampling(6, ask) for ask in (*asks, None)], use_tqdm=False)
    assert outputs[-1].outputs[0].attention is None
    edits = [ask for ask in asks if "steer" in ask]
    for plain, output, ask in zip(alone, outputs, (*asks, {}), strict=True):
        assert ask in edits or output.outputs[0].token_ids == plain.outputs[0].token_ids, "no request changes another one"
    return [output.outputs[0] for output in outputs]


def refused(completion: Any, *words: str) -> None:
    attention = completion.attention
    assert attention.is_empty() and all(word in attention.refused for word in words), attention


def chunks() -> None:
    """Llama 4: virtual batches in all layers but every fourth."""
    sizes = {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_hidden_layers": 4, "head_dim": 32}
    folder = saved("Llama4Text", of="Llama4ForCausalLM", attention_chunk_size=32, **sizes)
    llm, maps = engine(folder, block_size=32, enable_prefix_caching=False), Maps(folder)
    edited, asked, _ = answered(llm, {"steer": CUT, "statistics": []}, everything())
    for completion in (edited, asked):
        refused(completion, "model.layers.0", "within chunks")
    with mock.patch.object(worker, "refusal", return_value=""):  # virtual batches of any kind
        edited, asked, _ = answered(llm, {"steer": CUT, "statistics": []}, everything())
    for completion in (edited, asked):
        refused(completion, "the rows of model.layers.0", "are not the requests of the batch")
    edited, asked, _ = answered(llm, {"steer": [{**CUT[0], "layers": [3]}], "layers": [3]}, everything(layers=[3]))
    assert not edited.attention.refused and not asked.attention.refused
    assert edited.attention.mass.shape == (6, 1, 4, 3) and asked.attention.received.shape == (1, 4, 90)
    maps.check(asked, prompts(*LENGTHS)[1]["prompt_token_ids"], layers=(3,))


def heads() -> None:
    """Laguna: layers with different numbers of heads."""
    llm = engine(saved("Laguna", num_attention_heads_per_layer=[4, 8], head_dim=32, mlp_layer_types=["dense", "dense"]))
    edited, asked, _ = answered(llm, {"steer": CUT, "statistics": []}, everything())
    for completion in (edited, asked):
        refused(completion, "model.layers.1", "has 8 heads, and the model 4")
    edited, asked, _ = answered(llm, {"steer": [{**CUT[0], "layers": [0]}], "layers": [0]}, everything(layers=[0]))
    assert edited.attention.mass.shape == (6, 1, 4, 3) and asked.attention.received.shape == (1, 4, 90)


def no_attention() -> None:
    """As Nemotron-NAS has them."""
    llm = engine(saved())
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    runner.model.model.layers[1].self_attn.forward = lambda positions, hidden_states: torch.zeros_like(hidden_states)
    edited, asked, _ = answered(llm, {"steer": CUT, "statistics": []}, everything())
    for completion in (edited, asked):
        refused(completion, "layers [1] have no attention")
    edited, asked, _ = answered(llm, {"steer": [{**CUT[0], "layers": [0]}], "layers": [0]}, everything(layers=[0]))
    close(edited.attention.mass.sum(-1), torch.ones(6, 1, 4))
    assert asked.attention.received.shape == (1, 4, 90)


if __name__ == "__main__":
    main()
