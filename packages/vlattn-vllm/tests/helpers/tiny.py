"""Tiny random models in folders, an engine of vLLM for each, and what transformers' eager maps say of its answers.

A scenario imports this before vllm, which reads the environment.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING", OMP_NUM_THREADS="1", VLLM_CPU_KVCACHE_SPACE="1"
)
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":  # it launches Triton's kernels, which then run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"
    from types import SimpleNamespace

    from triton.backends import Backend, backends

    backends["cpu"] = Backend(compiler=None, driver=SimpleNamespace(is_active=lambda: False))  # vLLM asks for one of this name

import tempfile
from typing import Any

import torch
from torch import Tensor

SIZES = {
    "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 512, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = {"kind": "Gemma2", "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0}
SPANS = {"begin": [[0, 3]], "rest": [[3, 5], [6, None]]}  # token 5 has no group


def saved(kind: str = "Qwen2", of: str = "", **options: Any) -> str:
    """A folder with a random model, whose attention is far from even. of: its class, if its name is not the configuration's."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    model = getattr(transformers, of or f"{kind}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data.mul_(6)
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return folder


def with_tokenizer(folder: str, **media: int) -> str:
    """The folder with a tokenizer, in which word w7 is token 7, and a chat template; `image=511` makes token 511 <image>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    names = [*special.values(), *[f"w{number}" for number in range(3, 512)]]
    for medium, number in media.items():
        names[number] = f"<{medium}>"
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    more = {f"{medium}_token": f"<{medium}>" for medium in media}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=more, **special)
    tokenizer.chat_template = "{% for message in messages %}w3 {{ message['content'] }} w4 {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def engine(folder: str, **options: Any) -> Any:
    """Several ranks of tensor parallelism run in processes of their own."""
    if options.get("tensor_parallel_size", 1) > 1:
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="0|1")
    from vllm import LLM

    usual = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 256, "dtype": "float32", "max_num_seqs": 8}
    return LLM(folder, **{**usual, **options})


def prompts(*lengths: int, seed: int = 1) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"prompt_token_ids": torch.randint(3, 512, (length,), generator=generator).tolist()} for length in lengths]


def sampling(tokens: int = 6, ask: dict[str, Any] | None = None, **options: Any) -> Any:
    from vllm import SamplingParams

    extra = None if ask is None else {"vlattn": ask}
    usual = {"max_tokens": tokens, "detokenize": False, "temperature": 0, "ignore_eos": True, "extra_args": extra}
    return SamplingParams(**{**usual, **options})


def everything(**options: Any) -> dict[str, Any]:
    return {"statistics": ["mass", "entropy", "maximum", "diagonal", "received"], "groups": SPANS, **options}


class Maps:
    """transformers' eager maps of the model in a folder."""

    def __init__(self, folder: str) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()

    @torch.no_grad()
    def __call__(self, prompt: list[int], tokens: list[int]) -> Tensor:
        """(layers, heads, N, N) of the prompt and all tokens but the last, which is no query."""
        return torch.stack(self.model(torch.tensor([prompt + tokens[:-1]]), output_attentions=True).attentions)[:, 0]

    def check(self, completion: Any, prompt: list[int], first: int = 0, layers: tuple[int, ...] = (0, 1)) -> None:
        """The statistics of a completion, whose queries ran from position `first` on, are those of the maps."""
        got, tokens = completion.attention, list(completion.token_ids)
        maps = self(prompt, tokens)[list(layers)]
        rows = maps[:, :, len(prompt) - 1 :].permute(2, 0, 1, 3)
        mass = torch.stack([rows[..., :3].sum(-1), rows[..., 3:5].sum(-1) + rows[..., 6:].sum(-1)], -1)
        assert rows.amax(-1).std() > 0.03  # an even attention would hide which key is which
        assert not got.refused and got.layers == layers and got.groups == (*SPANS,)
        assert got.queries == (first, len(prompt) + len(tokens) - 1), got.queries
        close(got.mass, mass)
        close(got.entropy, -torch.special.xlogy(rows, rows).sum(-1))
        close(got.maximum, rows.amax(-1))
        close(got.diagonal, maps.diagonal(dim1=2, dim2=3).permute(2, 0, 1)[len(prompt) - 1 :])
        close(got.received, maps[:, :, first:, : len(prompt)].sum(2))


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
