"""Scenario: two ranks of tensor parallelism; the heads of both are gathered."""

from __future__ import annotations

from tests.helpers.tiny import Maps, engine, everything, prompts, sampling, saved


def main() -> None:
    folder = saved()
    llm = engine(folder, tensor_parallel_size=2, max_num_batched_tokens=64)
    some = prompts(5, 90, 33)
    asks = [everything(), None, everything(layers=[1])]
    outputs = llm.generate(some, [sampling(6, ask) for ask in asks], use_tqdm=False)
    maps = Maps(folder)
    maps.check(outputs[0].outputs[0], some[0]["prompt_token_ids"])
    maps.check(outputs[2].outputs[0], some[2]["prompt_token_ids"], layers=(1,))
    assert outputs[1].outputs[0].attention is None


if __name__ == "__main__":
    main()
