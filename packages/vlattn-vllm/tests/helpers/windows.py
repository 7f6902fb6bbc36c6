"""Scenario: Gemma 2, whose layers have a scale of their own, a softcap, and by turns a window; two groups of caches."""

from __future__ import annotations

from tests.helpers.tiny import Maps, engine, everything, prompts, sampling, saved


def main() -> None:
    folder = saved("Gemma2", head_dim=32, sliding_window=16, query_pre_attn_scalar=20, attn_logit_softcapping=2.0)
    llm = engine(folder, max_num_batched_tokens=64)
    some = prompts(5, 90, 33)
    maps = Maps(folder)
    for prompt, output in zip(some, llm.generate(some, sampling(20, everything()), use_tqdm=False), strict=True):
        maps.check(output.outputs[0], prompt["prompt_token_ids"])


if __name__ == "__main__":
    main()
