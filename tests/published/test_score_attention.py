"""Score functions of Cao et al. (COLING 2022): the attention layers of their M4C, with a mask, forward and gradients."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.published.authors import assert_equal, defined, published
from vlattn_fast import scores

pytestmark = pytest.mark.filterwarnings("ignore")  # what their code warns of

FILES: dict[str, Callable[..., Any]] = {
    "modeling_bert_original": lambda: "scaled_dot",
    "modeling_bert_general_qwk": lambda weight: scores.General(weight),
    "modeling_bert_biased_general_qwk": lambda weight, bias: scores.General(weight, bias),
    "modeling_bert_act_general_qwk": lambda weight, bias: scores.General(weight, bias, activation="relu"),
}


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float64, "auto"), (torch.float64, "reference"), (torch.float32, "auto")])
@pytest.mark.parametrize("file", FILES)
def test_layers_of_m4c(file: str, dtype: torch.dtype, backend: str) -> None:
    def layer_of() -> Any:
        path = f"M4C/pytorchtransformers/{file}.py"
        found = defined("adlnlp/Attention_VL", path, "BertSelfAttention", torch=torch, nn=nn, math=math).BertSelfAttention
        return found(
            SimpleNamespace(hidden_size=24, num_attention_heads=3, output_attentions=False, attention_probs_dropout_prob=0.0)
        )

    def shapes() -> dict[str, Any]:
        layer = layer_of()
        return {"W": [[*x.shape] for x in layer.W.parameters()] if hasattr(layer, "W") else []}

    shapes_of_w = published(f"m4c {file}, shapes", shapes)["W"]
    torch.manual_seed(0)
    heads = [torch.randn(2, 3, 7, 8, dtype=torch.float64).requires_grad_() for _ in range(3)]
    parameters = [0.4 * torch.randn(shape, dtype=torch.float64) for shape in shapes_of_w]
    states, mask = torch.randn(2, 7, 24, dtype=torch.float64), torch.zeros(2, 1, 1, 7, dtype=torch.float64)
    mask[0, ..., 5:] = -10000.0
    cotangent = torch.randn(2, 3, 7, 8, dtype=torch.float64)

    def compute() -> dict[str, Tensor]:
        layer = layer_of().double().eval()
        own = list(layer.W.parameters()) if parameters else []
        for parameter, value in zip(own, parameters, strict=True):
            parameter.data.copy_(value)
        layer.query = layer.key = layer.value = nn.Identity()
        given = iter(heads)
        layer.transpose_for_scores = lambda _: next(given)  # queries, keys and values are leaves
        out = layer(states, mask)[0].unflatten(-1, (3, 8)).transpose(1, 2)
        grads = torch.autograd.grad(out, [*heads, *own], cotangent)
        return {"out": out, **dict(zip(("query", "key", "value", "weight", "bias"), grads, strict=False))}

    wanted = dict(published(f"m4c {file}", compute))
    leaves = [x.detach().to(dtype).requires_grad_() for x in (*heads, *parameters)]
    got = va.score_attention(*leaves[:3], score=FILES[file](*leaves[3:]), attn_mask=mask.to(dtype), backend=backend)
    assert_equal(got, wanted.pop("out"), "out")
    grads: tuple[Tensor, ...] = torch.autograd.grad(got, leaves, cotangent.to(dtype))
    for grad, (name, there) in zip(grads, wanted.items(), strict=True):
        assert_equal(grad, there, name)
