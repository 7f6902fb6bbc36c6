"""capture_attention against the projections that a model's own hooks see, in training mode, and the loss in real loops."""

import copy
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.interpret import decoder_cases
from tests.helpers.nn.models import BOXES, HEAD_DIM, HEADS, MODELS, WORDS, Joined, answer, uniter, visual_bert
from tests.helpers.releases import checkpointing
from vlattn_fast.backends.reference.congruence_loss import congruence_loss as formula
from vlattn_fast.nn import CongruenceLoss, capture_attention

# The modules that project: path of the layer's query and key, of words, image or both, and of cross-attention.
JOINT = {
    "VisualBERT": "visual_bert.encoder.layer.1.attention.self",
    "ViLT": "vilt.encoder.layer.1.attention.attention",
    "UNITER": "uniter.encoder.layer.1.attention.self",
}
STREAMS = {
    "LXMERT": ("lxmert.encoder.x_layers.1.lang_self_att.self", "lxmert.encoder.x_layers.1.visn_self_att.self"),
    "CLIP, sdpa": ("text_model.encoder.layers.1.self_attn", "vision_model.encoder.layers.2.self_attn"),
    "CLIP, eager": ("text_model.encoder.layers.1.self_attn", "vision_model.encoder.layers.2.self_attn"),
}


def watched(model: nn.Module, path: str) -> dict[str, list[Tensor]]:
    """Lists that each forward pass adds the outputs of the module's query and key projections to, as (B, H, N, D)."""
    module, found = model.get_submodule(path), {"query": [], "key": []}
    for name, projections in (("query", ("query", "q_proj")), ("key", ("key", "k_proj"))):
        linear = next(getattr(module, each) for each in projections if hasattr(module, each))

        def keep(module: nn.Module, args: Any, output: Tensor, into: list[Tensor] = found[name]) -> None:
            into.append(output.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2))

        linear.register_forward_hook(keep)
    return found


@pytest.mark.parametrize("name", JOINT)
def test_one_sequence(name: str) -> None:
    model, inputs = MODELS[name]()
    seen = watched(model.train(), JOINT[name])
    with capture_attention(model) as captured:
        model(**inputs)
    assert torch.equal(captured.query, seen["query"][0]) and torch.equal(captured.key, seen["key"][0])
    text, image, cross = captured.split(WORDS)
    assert cross is None
    assert torch.equal(text[0], captured.query[:, :, :WORDS]) and torch.equal(image[1], captured.key[:, :, WORDS:])
    weight = next(parameter for name, parameter in model.named_parameters() if "layer.0" in name)
    ours, hooked = (
        torch.autograd.grad(x.square().sum(), weight, retain_graph=True)[0] for x in (captured.query, seen["query"][0])
    )
    assert torch.equal(ours, hooked) and bool(ours.any())
    with pytest.raises(ValueError, match="over only text tokens, but over joint; split"):
        _ = captured.text


@pytest.mark.parametrize(("name", "seen"), [("BERT", "text"), ("ViT", "image"), ("LXMERT", "text and over image")])
def test_split_says_what_it_has_instead_of_one_sequence(name: str, seen: str) -> None:
    model, inputs = MODELS[name]()
    with capture_attention(model) as captured:
        model(**inputs)
    with pytest.raises(ValueError, match=f"needs a sequence of words and image; the captured layer has attention over {seen}$"):
        captured.split(WORDS)


@pytest.mark.parametrize("name", STREAMS)
def test_two_streams(name: str) -> None:
    model, inputs = MODELS[name]()
    paths = STREAMS[name]
    seen = [watched(model.train(), path) for path in paths]
    with capture_attention(model) as captured:
        model(**inputs)
    for pair, each in ((captured.text, seen[0]), (captured.image, seen[1])):
        assert torch.equal(pair[0], each["query"][0]) and torch.equal(pair[1], each["key"][0])
    assert (captured.cross is None) == name.startswith("CLIP")
    with pytest.raises(ValueError, match="two sequences; read text or image"):
        _ = captured.query


def test_cross_attention_both_ways() -> None:
    """LXMERT's layer has one module for both directions: words ask first."""
    model, inputs = MODELS["LXMERT"]()
    seen = watched(model.train(), "lxmert.encoder.x_layers.0.visual_attention.att")
    with capture_attention(model, layers=[-2, -1]) as captured:
        model(**inputs)
    assert len(captured) == 2
    cross = captured[0].cross
    assert cross is not None
    for way in (0, 1):
        assert torch.equal(cross[way][0], seen["query"][way]) and torch.equal(cross[way][1], seen["key"][way])
    with pytest.raises(ValueError, match=r"layers must be one index for fields of the capture itself; got 2"):
        _ = captured.text


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_grouped_heads_of_a_decoder(implementation: str) -> None:
    model, inputs = MODELS[f"Llama, {implementation}"]()
    with capture_attention(model.train(), layers=0) as captured:
        model(**inputs)
    assert captured.query.shape == captured.key.shape == (2, HEADS, WORDS, HEAD_DIM)
    assert torch.equal(captured.key[:, 0], captured.key[:, 1]) and not torch.equal(captured.key[:, 0], captured.key[:, 2])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("joint", [True, False])
def test_layers_of_torch(joint: bool, training: bool) -> None:
    """nn.MultiheadAttention, also where eval mode would take its fast path."""
    model = Joined(joint).train(training)
    inputs = {"input_ids": torch.randint(99, (2, 5)), "features": torch.randn(2, 3, 20)}
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.set_grad_enabled(training), capture_attention(model, modality={"features": "image"}) as captured:
        model(**inputs)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    if joint:
        assert captured.query.shape == (2, 4, 8, 8)
    else:
        assert captured.text[0].shape == (2, 4, 5, 8) and captured.image[0].shape == (2, 4, 3, 8)
        weight, bias = model.encoder.layers[0].self_attn.in_proj_weight, model.encoder.layers[0].self_attn.in_proj_bias
        with torch.set_grad_enabled(training), capture_attention(model, layers=0, modality={"features": "image"}) as first:
            model(**inputs)
        query = nn.functional.linear(model.embed(inputs["input_ids"]), weight[:32], bias[:32])
        torch.testing.assert_close(first.text[0], query.unflatten(-1, (4, 8)).transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_products_by_keywords() -> None:
    class Attends(nn.Module):
        def forward(self, text: Tensor) -> Tensor:
            scores = torch.matmul(other=text.mT, input=2 * text)
            return torch.softmax(input=scores, dim=-1) @ text

    model, text = Attends(), torch.randn(2, 4, 5, 8)
    with capture_attention(model) as seen:
        model(text)
    assert torch.equal(seen.text[0], 2 * text) and torch.equal(seen.text[1], text)


def test_captures_that_overlap_leave_the_fast_path_as_it_was() -> None:
    first, second = (capture_attention(Joined(joint=True)) for _ in range(2))
    fast = torch.backends.mha.get_fastpath_enabled()
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with second:
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        while not entered.wait(0.1) and thread.is_alive():
            pass  # until it is there, or has failed
    enabled = torch.backends.mha.get_fastpath_enabled()
    left.set()
    thread.join()
    assert not enabled
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_modality_by_names() -> None:
    model = Joined(joint=True)
    inputs = {"input_ids": torch.randint(99, (2, 5)), "features": torch.randn(2, 3, 20)}
    for wrong, words in (({"features": "sound"}, "one of"), ({"pictures": "image"}, "must name inputs of the model")):
        with pytest.raises(ValueError, match=words), capture_attention(model, modality=wrong):
            model(**inputs)


def test_a_frozen_tower_without_gradients() -> None:
    """A vision tower under no_grad, as ms-swift runs it: the gradients are those of the tower as part of the graph."""
    case = decoder_cases.llava()
    model, inputs = case.model, case.inputs()
    tower, results = model.get_submodule(case.vision).requires_grad_(False), []
    for forward in (torch.no_grad()(tower.forward), tower.forward):
        tower.forward = forward
        model.zero_grad()
        with capture_attention(model.train()) as captured:
            model(**inputs)
        captured.query.square().sum().backward()
        results.append([x.grad for x in model.parameters() if x.grad is not None])
    assert len(results[0]) > 5
    torch.testing.assert_close(*results)


def test_refusals() -> None:
    model, inputs = visual_bert()
    for layers in ([], [True], "last", None, 1.5):
        with pytest.raises(ValueError, match="layers must be an int or several ints"):
            capture_attention(model, layers=layers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers must be among 2 layers; got 2"), capture_attention(model, layers=2):
        model(**inputs)
    with capture_attention(model) as captured:
        pass
    with pytest.raises(ValueError, match="captured no forward pass"):
        _ = captured.query
    no_attention = pytest.raises(ValueError, match="captured no self-attention over all tokens .*; its attention must be")
    with no_attention, capture_attention(nn.Linear(3, 3)) as captured:
        captured.model(torch.randn(2, 3))
    checkpointing(model, {"use_reentrant": True})
    model.train().get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="use_reentrant=True"), capture_attention(model):
        model(**inputs)


def test_the_last_forward_pass_counts() -> None:
    model, inputs = MODELS["LXMERT"]()
    plain = answer(model.eval()(**inputs))
    with capture_attention(model) as captured:
        assert torch.equal(answer(model(**inputs)), plain)
        first = captured.text[0]
        model(**inputs)
        assert captured.text[0] is not first


def masks(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"text_mask": inputs["attention_mask"].bool(), "image_mask": torch.ones(2, BOXES, dtype=torch.bool)}


def loss_and_grads(model: nn.Module, inputs: dict[str, Tensor], loss: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with capture_attention(model) as captured:
        outputs = answer(model(**inputs))
    value = loss(captured, **masks(inputs))
    (value + outputs.square().mean()).backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["cacr", "iais_singular", "iais_distributed"])
@pytest.mark.parametrize("name", ["VisualBERT", "LXMERT", "UNITER"])
def test_gradient_of_the_loss(name: str, kind: str) -> None:
    """Gradients of every weight of the model, against the formula on what the layer's projections gave."""
    model, inputs = MODELS[name]()
    model = model.double().eval()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    got = loss_and_grads(model, inputs, CongruenceLoss(kind))

    def reference(captured: Any, **masks: Tensor) -> Tensor:
        parts = captured.split(WORDS) if name in JOINT else (captured.text, captured.image, captured.cross)
        return formula(*parts, kind=kind, direction="both", scale=HEAD_DIM**-0.5, reduction="mean", **masks)

    wanted = loss_and_grads(model, inputs, reference)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)


def test_under_autocast() -> None:
    """bf16 projections, a float32 loss, float32 gradients near those without autocast."""
    model, inputs = visual_bert()
    wanted = loss_and_grads(model.eval(), inputs, CongruenceLoss("iais_distributed"))
    with torch.autocast("cpu", torch.bfloat16):
        value, grads = loss_and_grads(model, inputs, CongruenceLoss("iais_distributed"))
    assert value.dtype == torch.float32 and all(grad.dtype == torch.float32 for grad in grads.values())
    torch.testing.assert_close(value, wanted[0], rtol=0.05, atol=1e-4)


def gradients(model: nn.Module, inputs: dict[str, Tensor], inside: bool = False) -> dict[str, Tensor]:
    """Gradients of a capture's tensors and of the outputs; inside: with the backward pass in the context."""
    torch.manual_seed(1)
    with capture_attention(model, modality={"features": "image"} if "features" in inputs else None) as captured:
        outputs = model(**inputs)
        outputs = outputs if isinstance(outputs, Tensor) else answer(outputs)
        loss = sum(x.square().mean() for pair in pairs(captured.layer) for x in pair) + outputs.square().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def pairs(layer: Any) -> list[tuple[Tensor, Tensor]]:
    return [pair for pair in (layer.text, layer.image, layer.joint) if pair is not None]


class Checkpointed(Joined):
    """torch's own layers, which run again in the backward pass."""

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        states = torch.cat([self.embed(input_ids), self.project(features)], 1)
        for layer in self.encoder.layers:
            states = checkpoint(layer, states, use_reentrant=False)
        return states


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["torch", "VisualBERT", "CLIP, sdpa"])
def test_layers_that_run_again(name: str, inside: bool) -> None:
    """torch.utils.checkpoint, which counts what is saved: the gradients are those without it."""
    if name == "torch":
        model: nn.Module = Joined(joint=True)
        inputs = {"input_ids": torch.randint(99, (2, 5)), "features": torch.randn(2, 3, 20)}
        again: nn.Module = Checkpointed(joint=True)
        again.load_state_dict(model.state_dict())
    else:
        model, inputs = MODELS[name]()
        again = copy.deepcopy(model)
        checkpointing(again, {"use_reentrant": False})
    wanted = gradients(model.train(), inputs)
    torch.testing.assert_close(gradients(again.train(), inputs, inside), wanted, rtol=1e-4, atol=1e-6)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # FSDP of one process, and without a GPU
def test_inputs_of_fsdp_without_names(alone: None) -> None:
    """FSDP's own forward takes *args."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, inputs = uniter()
    model.eval()
    given = [inputs[name] for name in ("input_ids", "region_features", "region_positions")]
    wanted, got = (
        capture_attention(copy.deepcopy(model)),
        capture_attention(FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)),
    )
    for captured in (wanted, got):
        with captured:
            captured.model(*given)
    torch.testing.assert_close(got.query, wanted.query)
