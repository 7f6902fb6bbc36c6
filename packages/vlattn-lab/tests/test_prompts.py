"""`prompt_maps` against maps that are all stored and then added up as published, on small diffusion models of diffusers."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import vlattn_fast as va
import vlattn_lab as lab
from tests.helpers.diffusion_cases import CASES, HEIGHT, LENGTH, WIDTH, Case
from tests.helpers.stored_prompts import published, stored, traced
from vlattn_lab.prompting import diffusion_trace

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_equals_stored_maps(case, dtype, monkeypatch):
    case.model.to(dtype)
    passes = [case.inputs(batch=2, dtype=dtype) for _ in range(2)]
    maps = traced(case, passes)
    assert maps.steps == 2 and set(maps.grids) == case.grids
    expected = published(case, stored(case, passes, monkeypatch), slice(None), case.size)
    assert expected.shape == (2, case.registers + LENGTH, *case.size)
    torch.testing.assert_close(maps.token_maps(), expected, rtol=0, atol=TOLERANCES[dtype])
    assert (expected[0] - expected[1]).abs().max() > 1e-3 and expected.std() > 1e-3  # two prompts, and no even maps


def test_only_the_conditional_half_counts(case, monkeypatch):
    passes = [case.inputs(batch=4) for _ in range(2)]
    expected = published(case, stored(case, passes, monkeypatch), slice(2, 4), case.size)
    torch.testing.assert_close(traced(case, passes, guidance="batch").token_maps(), expected, rtol=0, atol=1e-5)


def test_only_conditional_calls_count(case, monkeypatch):
    passes = [case.inputs(batch=2) for _ in range(4)]
    kept = [each for each in stored(case, passes, monkeypatch) if each[1] in (0, 2)]
    maps = traced(case, passes, guidance="calls")
    assert maps.steps == 2
    torch.testing.assert_close(maps.token_maps(), published(case, kept, slice(None), case.size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_padding_gets_nothing(name):
    case = CASES[name]()
    maps = traced(case, [case.inputs(batch=2, real=5)]).token_maps()
    assert (maps[1, 5:].abs() < 1e-7).all() and (maps[1, :5].abs().amax((1, 2)) > 1e-3).all()
    assert (maps[0, 5:].abs().amax((1, 2)) > 1e-3).all()


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_any_size(mode, monkeypatch):
    case = CASES["unet"]()
    passes = [case.inputs(batch=1)]
    expected = published(case, stored(case, passes, monkeypatch), slice(None), (20, 30), mode)
    maps = traced(case, passes)
    torch.testing.assert_close(maps.token_maps(size=(20, 30), mode=mode), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(maps.token_maps(3, size=(20, 30), mode=mode), expected[:, 3], rtol=0, atol=1e-5)
    torch.testing.assert_close(maps.token_maps([4, 1], size=(20, 30), mode=mode), expected[:, [4, 1]], rtol=0, atol=1e-5)


def test_chosen_layers(monkeypatch):
    """Without the middle block, as in DAAM's own code."""
    case = CASES["unet"]()
    passes = [case.inputs(batch=1)]
    kept = [each for each in stored(case, passes, monkeypatch) if case.cut(each[0]) is not None]
    paths = []
    for path, module in case.model.named_modules():
        if hasattr(module, "processor") and path.endswith("attn2"):
            paths.append(path)
    order = sorted(paths, key=lambda path: ("down", "mid", "up").index(path.split("_")[0]))
    assert len(order) == len(kept)
    without = [each for path, each in zip(order, kept, strict=True) if "mid_block" not in path]
    assert len(without) == len(kept) - 1
    maps = traced(case, passes, layers=lambda path: "mid_block" not in path)
    torch.testing.assert_close(maps.token_maps(), published(case, without, slice(None)), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="got a forward pass of .*layers= chooses the calls that count"):
        traced(case, passes, layers=lambda path: False)


def test_text_as_long_as_the_picture(monkeypatch):
    """The order is not to be seen in lengths then; it is known by name, or said."""
    for name in ("sd3", "flux"):
        torch.manual_seed(0)
        case = CASES[name]()
        length = case.size[0] * case.size[1]
        passes = [case.inputs(batch=1, length=length)]
        kept = stored(case, passes, monkeypatch)
        expected = published(case, kept, slice(None), case.size)
        torch.testing.assert_close(traced(case, passes).token_maps(), expected, rtol=0, atol=1e-5)
        monkeypatch.setattr(diffusion_trace, "TEXT_FIRST", {})
        with pytest.raises(ValueError, match=r"text_first must be True or False.*got None for \w+Transformer2DModel, in '"):
            traced(case, passes)
        said = traced(case, passes, text_first=name == "flux").token_maps()
        torch.testing.assert_close(said, expected, rtol=0, atol=1e-5)
        monkeypatch.undo()


def test_joint_attention_in_slices(monkeypatch):
    monkeypatch.setattr(diffusion_trace, "_ELEMENTS", 100)
    for name in ("sd3", "flux"):
        case = CASES[name]()
        passes = [case.inputs(batch=2)]
        expected = published(case, stored(case, passes, monkeypatch), slice(None), case.size)
        torch.testing.assert_close(traced(case, passes).token_maps(), expected, rtol=0, atol=1e-5)


@dataclass
class Largest(TorchDispatchMode):
    """The largest result of any operator, and how often attention_map ran."""

    elements: int = 0
    maps: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.maps += "attention_map" in str(func)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_map_per_head_is_made():
    """The largest tensor is one head mean; all heads of that layer would be twice as large."""
    case = CASES["unet"]()
    inputs = case.inputs(batch=1, length=600)
    with torch.no_grad(), Largest() as plain:
        case.model(**inputs)
    with torch.no_grad(), Largest() as largest, lab.prompt_maps(case.model, guidance="none") as maps:
        case.model(**inputs)
    assert plain.elements < largest.elements == HEIGHT * WIDTH * 600
    assert plain.maps == 0 and largest.maps == sum(path.endswith("attn2") for path, _ in case.model.named_modules())
    kept = maps._trace.sums
    assert {grid: tuple(total.shape) for grid, total in kept.items()} == {(h, w): (1, h * w, 600) for h, w in case.grids}
    assert not any(total._is_view() for total in kept.values())  # which would hold a larger one


def test_the_network_runs_as_it_was(case):
    inputs, processors = case.inputs(batch=2), dict(case.model.attn_processors)
    with torch.no_grad():
        plain = case.model(**inputs)[0]
        with lab.prompt_maps(case.model, guidance="none"):
            seen = case.model(**inputs)[0]
            assert all(case.model.attn_processors[path] is each for path, each in processors.items())
    torch.testing.assert_close(seen, plain, rtol=0, atol=0)


def test_gradients_pass():
    case = CASES["unet"]()
    inputs = case.inputs(batch=1)
    case.model(**inputs).sample.sum().backward()
    expected = [parameter.grad.clone() for parameter in case.model.parameters() if parameter.grad is not None]
    case.model.zero_grad()
    with lab.prompt_maps(case.model, guidance="none") as maps:
        case.model(**inputs).sample.sum().backward()
    assert not maps.token_maps().requires_grad
    torch.testing.assert_close([p.grad for p in case.model.parameters() if p.grad is not None], expected)


def test_inference_mode_and_plain_runs_add_up():
    case = CASES["unet"]()
    passes = [case.inputs(batch=1) for _ in range(2)]
    with lab.prompt_maps(case.model, guidance="none") as maps:
        with torch.inference_mode():
            case.model(**passes[0])
        case.model(**passes[1])
    torch.testing.assert_close(maps.token_maps(), traced(case, passes).token_maps())


def test_processors_without_sdpa_are_refused():
    from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

    for processor in (AttnProcessor(), SlicedAttnProcessor(1)):
        case = CASES["unet"]()
        case.model.set_attn_processor(processor)
        with pytest.raises(ValueError, match=rf"got {type(processor).__name__} in 'down_blocks\.0\.attentions\.0.*attn2'"):
            traced(case, [case.inputs(batch=1)])


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_joint_attention_by_hand_is_refused(name):
    """Also where text and picture come as one sequence, as in Flux's single blocks."""
    case = CASES[name]()
    path = "single_transformer_blocks.0.attn" if name == "flux" else "transformer_blocks.1.attn"
    module = case.model.get_submodule(path)

    class ByHand:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **options):
            return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)

    module.processor = ByHand()
    with pytest.raises(ValueError, match=f"must compute attention by .*; got ByHand in '{path}'"):
        traced(case, [case.inputs(batch=1)])


def test_a_network_without_text_is_refused():
    class Denoiser(nn.Module):
        def forward(self, sample):
            tokens = sample.flatten(2).mT[:, None]
            return functional.scaled_dot_product_attention(tokens, tokens, tokens)

    network = Denoiser()
    with pytest.raises(ValueError, match=r"Denoiser with no text tokens and attention of queries x keys: 24 x 24; pass patches="):
        with lab.prompt_maps(network, guidance="none"):
            network(torch.randn(1, 8, 4, 6))


def test_tokens_whose_grid_is_said():
    class Denoiser(nn.Module):
        def forward(self, hidden_states, encoder_hidden_states):
            return functional.scaled_dot_product_attention(hidden_states[:, None], *[encoder_hidden_states[:, None]] * 2)

    network, inputs = Denoiser(), (torch.randn(1, 24, 8), torch.randn(1, 5, 8))
    with pytest.raises(ValueError, match=r"5 text tokens and .* keys: 24 x 5; pass patches=va.PatchGrid\(rows, columns\)"):
        with lab.prompt_maps(network, guidance="none"):
            network(*inputs)
    with lab.prompt_maps(network, guidance="none", patches=va.PatchGrid(4, 6)) as maps:
        network(*inputs)
    expected = (inputs[0] @ inputs[1].mT / 8**0.5).softmax(-1).mT.unflatten(-1, (4, 6))
    torch.testing.assert_close(maps.token_maps(), expected)


def test_a_reference_picture_does_not_count(monkeypatch):
    """Flux Kontext puts a further picture's tokens behind those that are made, with another first id."""
    case = CASES["flux"]()
    inputs = case.inputs(batch=1)
    height, width = case.size
    inputs["hidden_states"] = torch.randn(1, 2 * height * width, 4)
    other = inputs["img_ids"].clone()
    other[:, 0] = 1
    inputs["img_ids"] = torch.cat([inputs["img_ids"], other])
    kept = stored(case, [inputs], monkeypatch)
    expected = torch.stack([p[0, :, LENGTH : LENGTH + height * width, :LENGTH].mean(0) for p, _ in kept]).mean(0)
    maps = traced(case, [inputs])
    torch.testing.assert_close(maps.token_maps()[0], expected.mT.unflatten(-1, case.size), rtol=0, atol=1e-5)
