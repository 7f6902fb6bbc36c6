"""`compare_prompts` next to patches by hooks of one's own."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.edited_maps import decoder, llama, made

PLACES = {"residual": "model.layers.{}", "head": "model.layers.{}.self_attn.o_proj", "mlp": "model.layers.{}.mlp"}
SCORE = (7, 9)


@contextlib.contextmanager
def hooked(model: nn.Module, changes: dict[tuple[str, int], Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """A context in which the states of (kind, layer) are changed; those of heads are inputs (B, N, H * D) of their projection."""
    handles = []
    for (kind, layer), change in changes.items():
        module = model.get_submodule(PLACES[kind].format(layer))
        if kind == "head":
            handles.append(module.register_forward_pre_hook(lambda _, args, change=change: (change(args[0].clone()),)))
        else:
            handles.append(module.register_forward_hook(lambda _, args, output, change=change: change(output.clone())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def states_of(model: nn.Module, inputs: dict[str, Any]) -> dict[tuple[str, int], Tensor]:
    kept: dict[tuple[str, int], Tensor] = {}

    def keeps(key: tuple[str, int]) -> Callable[[Tensor], Tensor]:
        return lambda x: kept.setdefault(key, x)

    keys = [(kind, layer) for kind in PLACES for layer in range(3)]
    with torch.no_grad(), hooked(model, {key: keeps(key) for key in keys}):
        model(**inputs)
    return kept


def score_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    return logits[:, SCORE[0]] - logits[:, SCORE[1]]


def prompts() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    model, clean = llama()
    corrupt = {**clean, "input_ids": clean["input_ids"].clone()}
    corrupt["input_ids"][:, 3] = torch.tensor([11, 12])
    return model, clean, corrupt


def replaced(at: Any, other: Tensor) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x[at] = other[at]
        return x

    return change


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_true_effects_are_those_of_hooks(direction: str) -> None:
    model, clean, corrupt = prompts()
    base, other = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    table = va.compare_prompts(model, clean, corrupt, SCORE, direction=direction, k=200)
    assert len(table.measured) == len(table.effects()) == 3 * (9 + 4 + 1)
    ends = {"clean": score_of(model, clean), "corrupt": score_of(model, corrupt)}
    torch.testing.assert_close(table.clean, ends["clean"], rtol=0, atol=1e-9)
    torch.testing.assert_close(table.corrupt, ends["corrupt"], rtol=0, atol=1e-9)
    states = states_of(model, other)
    for each in table.measured:
        at: Any = (slice(None), slice(None), slice(None))
        if each.kind == "residual":
            at = (slice(None), each.number)
        elif each.kind == "head":
            at = (..., slice(8 * each.number, 8 * each.number + 8))  # type: ignore[operator]
        with hooked(model, {(each.kind, each.layer): replaced(at, states[each.kind, each.layer])}):
            patched = score_of(model, base)
        expected = ((patched - ends["corrupt"]) / (ends["clean"] - ends["corrupt"])).mean()
        assert abs(each.true - float(expected)) < 1e-9, each
    changes = [abs(each.first_order - (direction == "noise")) for each in table.measured]
    assert changes == sorted(changes, reverse=True)


def test_first_order_effects_are_true_for_small_differences() -> None:
    model, clean = made("llava")
    torch.manual_seed(2)
    corrupt = {**clean, "pixel_values": clean["pixel_values"] + 3e-4 * torch.randn_like(clean["pixel_values"])}
    for direction in ("denoise", "noise"):
        table = va.compare_prompts(model, clean, corrupt, 7, direction=direction, k=25)
        for each in table.measured:
            assert abs(each.first_order - each.true) < 1e-2 * (1 + abs(each.true)), each
        assert table.rank_correlation is not None and table.rank_correlation > 0.99
    assert "rank correlation of first-order and true effects: " in repr(table)


def test_a_tower_may_pack_the_images_of_all_samples() -> None:
    model, clean = decoder("Mistral3ForConditionalGeneration")
    torch.manual_seed(2)
    corrupt = {**clean, "pixel_values": clean["pixel_values"] + 1e-4 * torch.randn_like(clean["pixel_values"])}
    table = va.compare_prompts(model, clean, corrupt, 7, tower="vision", k=8)
    for each in table.measured:
        assert abs(each.first_order - each.true) < 1e-2 * (1 + abs(each.true)), each


def test_the_last_position_carries_everything_after_the_last_layer() -> None:
    model, clean, corrupt = prompts()
    table = va.compare_prompts(model, clean, corrupt, SCORE, k=0)
    assert not table.measured and table.rank_correlation is None
    assert float(table.residual[2, :-1].abs().max()) == 0.0 == float(table.residual[:, :3].abs().max())


def test_a_path_is_what_one_head_hands_straight_to_another() -> None:
    model, clean, corrupt = prompts()
    table = va.compare_prompts(model, clean, corrupt, SCORE, k=0)
    own, other = states_of(model, corrupt), states_of(model, clean)
    (one, first), (two, second) = (0, 1), (2, 3)

    def sender(x: Tensor) -> Tensor:
        x = own["head", one].clone()
        x[..., 8 * first : 8 * first + 8] = other["head", one][..., 8 * first : 8 * first + 8]
        return x

    received: list[Tensor] = []
    fixed = {(kind, layer): lambda x, key=(kind, layer): own[key] for kind in ("head", "mlp") for layer in range(two)}
    with hooked(model, {**fixed, ("head", one): sender, ("head", two): lambda x: received.append(x) or x}):
        score_of(model, corrupt)
    at = (..., slice(8 * second, 8 * second + 8))
    with hooked(model, {("head", two): replaced(at, received[0])}):
        patched = score_of(model, corrupt)
    start, end = score_of(model, corrupt), score_of(model, clean)
    assert abs(table.patch_path((one, first), (two, second)) - float(((patched - start) / (end - start)).mean())) < 1e-9
    with pytest.raises(ValueError, match="receiver must be in a layer after that of the sender, 2; got 2"):
        table.patch_path((2, 0), (2, 1))
    with pytest.raises(ValueError, match="sender must be a head of layers 0, 1, 2; got"):
        table.patch_path((0, 4), (2, 1))
    with pytest.raises(TypeError, match=r"receiver must be \(layer, head\); got int"):
        table.patch_path((0, 1), 2)


def test_questions_of_other_lengths_are_compared_in_aligned_spans() -> None:
    model, clean, _ = prompts()
    ids = clean["input_ids"]
    corrupt = {"input_ids": torch.cat([ids[:, :3], torch.tensor([[40, 41], [42, 43]]), ids[:, 4:]], 1)}  # two words for one
    corrupt["attention_mask"] = torch.ones_like(corrupt["input_ids"])
    with pytest.raises(ValueError, match="clean and corrupt must have as many tokens, or align= .*; got 9 and 10"):
        va.compare_prompts(model, clean, corrupt, SCORE)
    align = [((0, 3), (0, 3)), ((4, 9), (5, 10))]
    table = va.compare_prompts(model, clean, corrupt, SCORE, align=align, k=200)
    assert table.positions == (0, 1, 2, 5, 6, 7, 8, 9) and table.residual.shape == (3, 8)
    states = states_of(model, clean)

    def moved(x: Tensor) -> Tensor:
        x[:, 7] = states["residual", 1][:, 6]
        return x

    with hooked(model, {("residual", 1): moved}):
        patched = score_of(model, corrupt)
    start, end = score_of(model, corrupt), score_of(model, clean)
    (got,) = (each.true for each in table.measured if each[:3] == ("residual", 1, 7))
    assert abs(got - float(((patched - start) / (end - start)).mean())) < 1e-9


def test_tables_and_figures() -> None:
    model, clean, corrupt = prompts()
    table = va.compare_prompts(model, clean, corrupt, 7, k=3)
    frame = table.to_pandas()
    assert list(frame.columns) == ["kind", "layer", "number", "first_order", "true"] and frame["true"].notna().sum() == 3
    assert [axes.get_title() for axes in table.plot().axes[:3]] == ["residual stream", "heads", "MLPs"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "both"}, ValueError, "direction must be one of"),
        ({"k": -1}, ValueError, "k must be"),
        ({"align": []}, TypeError, "align must be pairs of spans"),
        ({"align": [((0, 2), (0, 3))]}, ValueError, "align must be pairs of spans"),
        ({"align": [((0, 2), (0, 2)), ((1, 3), (2, 4))]}, ValueError, "got spans that overlap"),
        ({"align": [((8, 10), (8, 10))]}, ValueError, "of 9 and 9 tokens"),
        ({"align": [3]}, ValueError, "align must be pairs of spans"),
        ({"score": None}, ValueError, "score must be a target, or a pair of targets; got NoneType"),
        ({"score": (1, None)}, ValueError, "score must be a target, or a pair of targets"),
        ({"score": (1, 2, 3)}, ValueError, "score must be a target, or a pair of targets"),
        ({"tower": "text"}, ValueError, "tower must be one of"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, clean, corrupt = prompts()
    with pytest.raises(error, match=message):
        va.compare_prompts(model, clean, corrupt, options.pop("score", 7), **options)


def test_runs_that_cannot_be_compared() -> None:
    model, clean, corrupt = prompts()
    with pytest.raises(ValueError, match="clean and corrupt must have different scores"):
        va.compare_prompts(model, clean, clean, 7)
    with pytest.raises(ValueError, match="clean and corrupt must have as many samples; got 2 and 1"):
        va.compare_prompts(model, clean, {name: value[:1] for name, value in corrupt.items()}, 7)
