"""`capture_relevancy` with attention sinks, against maps that transformers stores, and of higher order under DDP."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from tests.helpers.nn import divided_relevancy
from tests.helpers.two_ranks import results_of
from tests.nn.test_capture_relevancy import PIXELS, made
from vlattn_fast.nn import capture_relevancy


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("method", "higher_order"), [("gradient", False), ("gradient", True), ("rollout", False)])
def test_sinks_get_the_gradient_of_stored_maps(method: str, higher_order: bool) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **experts, attn_implementation="eager"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    words, weight = torch.randint(3, 60, (2, 7)), torch.linspace(-1, 2, 7)

    outputs = model(input_ids=words, output_attentions=True)
    maps, score = outputs.attentions, outputs.logits[:, -1, 5].sum()
    row = torch.eye(7)[-1].expand(2, 1, 7)
    slopes = torch.autograd.grad(score, maps, create_graph=higher_order, retain_graph=True)
    for stored, slope in reversed(list(zip(maps, slopes, strict=True))):
        mean = stored.mean(1) if method == "rollout" else (stored * slope).relu().mean(1)
        if method == "rollout":  # a sink takes a part of each row: (I + mean) is divided by its sums
            row = row / (1 + mean.sum(-1))[:, None]
        row = row + row @ mean
    expected = torch.autograd.grad((row[:, 0] * weight).sum(), sinks)

    with capture_relevancy(model, method=method, higher_order=higher_order) as captured:
        score = model(input_ids=words).logits[:, -1, 5].sum()
    relevancy = captured.relevancy(None if method == "rollout" else score)
    torch.testing.assert_close(relevancy, row[:, 0], rtol=1e-4, atol=1e-6)
    for ours, stored in zip(torch.autograd.grad((relevancy * weight).sum(), sinks), expected, strict=True):
        torch.testing.assert_close(ours, stored, rtol=1e-3, atol=1e-6)
        assert stored.abs().max() > 1e-3  # not of the size of what is allowed


def test_copies_have_the_gradients_of_all_inputs(tmp_path: Path) -> None:
    """Two processes with one input each under DDP, with ∇A as a constant and without."""
    expected = divided_relevancy.replicated_gradients()
    for grads in results_of(divided_relevancy.__name__, "of_this_copy", tmp_path):
        torch.testing.assert_close(grads, expected)


def test_a_static_graph_is_refused() -> None:
    """DDP would add up the gradients of the copies behind the relevancy's backward pass, before the loss's has any."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(made("ViT"), static_graph=True)
        for wrapped in (model, torch.compile(model, backend="eager")):
            with pytest.raises(ValueError, match="Pass static_graph=False"):
                capture_relevancy(wrapped)
        with capture_relevancy(model, method="rollout") as captured:  # has no backward pass
            model(pixel_values=PIXELS)
        captured.relevancy()[:, 1:].sum().backward()
    finally:
        torch.distributed.destroy_process_group()
