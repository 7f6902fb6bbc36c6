"""Tokens that receive attention without content: how they are found, and rows without them against stored maps."""

import html
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.cases import lively
from tests.helpers.interpret.decoder_cases import DECODERS
from tests.helpers.interpret.linked_maps import published, with_gradients
from tests.helpers.interpret.stored_maps import Place, rows_by_method, with_floats, without
from tests.interpret.adapters.test_clip_mapper import IDS, LAYERS, inputs_of, mapper
from tests.interpret.adapters.test_clip_mapper import stored as stored_maps
from tests.interpret.adapters.test_derived import gpt_oss
from tests.interpret.relevancy.test_moved_tokens import SIZE, WIDTH, Moving, flip, leave, on
from vlattn_fast.interpret import LayerExplanation, explain, explain_layers, find_sinks
from vlattn_fast.interpret.dataset.pieces import pack, unpack
from vlattn_fast.interpret.relevancy import sink_detection as sinks
from vlattn_fast.interpret.relevancy.last_attention import attention_rows
from vlattn_fast.interpret.relevancy.methods.registry import with_options
from vlattn_fast.interpret.relevancy.traced_call import Recursion, TracedCall
from vlattn_fast.interpret.result.numbers.sink_tokens import Sink, sinks_line

METHODS = ("gradient", "rollout", "attention", "weighted")


@pytest.fixture
def some_sinks(monkeypatch):
    """Thresholds at which models with random weights have some."""
    monkeypatch.setattr(sinks, "TIMES", 1.2)
    monkeypatch.setattr(sinks, "NORM", 1.1)


def left_out(explanation, tower: str, layers: int, reader: str = "") -> tuple[Tensor, ...]:
    """bool (B, N) by layer, the keys that an explanation names."""
    batch, size = explanation.relevancy[tower].shape[-2:]
    masks = [torch.zeros(batch, size, dtype=torch.bool) for _ in range(layers)]
    for row, sample in enumerate(explanation.sinks):
        for sink in sample:
            for layer in sink.layers if (sink.tower, sink.reader) == (tower, reader or tower) else ():
                masks[layer][row, sink.index] = True
    return tuple(masks)


def names(found) -> list[list[tuple]]:
    return [[(sink.tower, sink.index, sink.reader, sink.layers, sink.place, sink.word) for sink in sample] for sample in found]


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


def check_case(case, inputs) -> None:
    model, inputs = case.model.double(), with_floats(inputs, torch.float64)
    found = explain(model, inputs, method=va.methods.Gradient(sinks="remove"))
    places = {name: tower.place(model, inputs) for name, tower in case.towers.items()}
    for name, place in places.items():
        layers = len(place.sums) + (place.pool is not None)
        places[name] = replace(place, left_out=left_out(found, name, layers))
        assert sum(bool(mask.any()) for mask in places[name].left_out) > 1  # several layers leave something out
    want = rows_by_method(model, inputs, lambda outputs: case.score(outputs, inputs), places, METHODS)
    plain = rows_by_method(
        model, inputs, lambda o: case.score(o, inputs), {n: replace(p, left_out=()) for n, p in places.items()}, METHODS
    )
    for method in METHODS:
        kept = explain(model, inputs, method=method)
        removed = explain(model, inputs, method=with_options(method, sinks="remove"))
        for name in places:
            assert_same(kept.relevancy[name], plain[method][name])
            assert_same(removed.relevancy[name], want[method][name])
        differ = [
            (want[method][name] - plain[method][name]).abs().max() > 1e-6 * plain[method][name].abs().max() for name in places
        ]
        assert any(differ) or method == "attention"  # whose one layer may have none
        assert all(sink.removed for sample in removed.sinks for sink in sample)
        assert kept.sinks is None and names(find_sinks(model, inputs)) == names(removed.sinks)


@pytest.mark.parametrize("case", ["clip", "siglip", "vit", "bert", "uniter", "llava", "qwen2_5_vl"], indirect=True)
def test_rows_without_sinks_are_those_of_stored_maps(case, some_sinks):
    check_case(case, case.inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("decoder", ["Gemma2ForCausalLM"], indirect=True)
def test_softcapped_scores_and_padding(decoder, side, some_sinks):
    inputs = decoder.inputs(side)
    check_case(decoder.case(inputs), inputs)


def test_a_learnt_sink_beside_them(some_sinks):
    """gpt-oss has one more logit in each softmax: rows of A sum to less than one, and they still do."""
    model = lively(gpt_oss()).eval().double()
    inputs = {"input_ids": torch.arange(3, 15).view(2, 6)}
    place = Place("model.layers", lambda size: torch.eye(size)[-1].expand(2, -1))
    score = lambda outputs: outputs.logits[:, -1].max(-1).values  # noqa: E731
    found = explain(model, inputs, method=va.methods.Gradient(sinks="remove"))
    layers = model.config.num_hidden_layers
    out = left_out(found, "language", layers)
    assert any(bool(mask.any()) for mask in out)
    methods = ("gradient", "rollout", "attention")
    want = rows_by_method(model, inputs, score, {"language": replace(place, left_out=out)}, methods)
    for method in methods:
        assert_same(
            explain(model, inputs, method=with_options(method, sinks="remove")).relevancy["language"], want[method]["language"]
        )


@pytest.mark.parametrize("method", ["gradient", "rollout", "attention"])
def test_towers_that_attend_to_one_another(method, some_sinks):
    model, inputs = mapper(), inputs_of(IDS)
    outputs, kinds, maps = stored_maps(model, inputs)
    maps = with_gradients(kinds, maps, outputs.logits.max(-1).values.sum())
    removed = explain(model, inputs, method=with_options(method, sinks="remove"))
    layers = {"ii": len([k for k in kinds if k == "ii"]), "tt": len([k for k in kinds if k == "tt"])}
    masks = {
        "ii": iter(left_out(removed, "vision", layers["ii"])),
        "tt": iter(left_out(removed, "text", layers["tt"])),
        "ti": iter(left_out(removed, "vision", layers["tt"], "text")[-LAYERS:]),
    }
    out = [next(masks[kind]) for kind in kinds]
    assert {kind for kind, mask in zip(kinds, out, strict=True) if bool(mask.any())} == {"ii", "tt", "ti"}
    rest = [(kind, without(a, mask, method), g) for (kind, a, g), mask in zip(maps, out, strict=True)]
    for name, want in zip(("text", "vision"), published(method, rest, [6, 3], IDS != 0), strict=True):
        assert_same(removed.relevancy[name], want)


@pytest.mark.parametrize("method", ["gradient", "attention"])
@pytest.mark.parametrize("case", ["vit", "bert"], indirect=True)
def test_each_layer_and_each_head(case, method, some_sinks):
    """All heads of a layer have one factor, so their mean is the row of the layer."""
    model, inputs = case.model.double(), with_floats(case.inputs, torch.float64)
    by_head = explain_layers(model, inputs, method=with_options(method, sinks="remove"), per="head")
    tower = next(iter(by_head.relevancy))
    model.set_attn_implementation("literal")
    outputs = model(**inputs, output_attentions=True)
    slopes = torch.autograd.grad(case.score(outputs, inputs).sum(), outputs.attentions)
    model.set_attn_implementation("sdpa")
    maps = list(zip(outputs.attentions, slopes, strict=True))
    masks = left_out(by_head, tower, len(maps))
    assert all(bool(mask.any()) for mask in masks)
    at, samples = by_head.position[tower], torch.arange(len(by_head))
    rest = []
    for (a, g), mask in zip(maps, masks, strict=True):
        a = without(a.detach(), mask, method)
        rest.append(((a * g).clamp(min=0) if method == "gradient" else a)[samples, :, at].transpose(0, 1))
    assert_same(by_head.relevancy[tower], torch.stack(rest))
    by_layer = explain_layers(model, inputs, method=with_options(method, sinks="remove"), per="layer")
    assert_same(by_layer.relevancy[tower], torch.stack(rest).mean(1))
    assert by_layer.at(1).sinks == by_layer.sinks


def dense(call: TracedCall, mask: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares, norms and sinks by the formulas, with whole maps; `mask` (B, H, N, M) says which pairs are seen."""
    heads = call.query.shape[1] // call.key.shape[1]
    key = call.key.repeat_interleave(heads, 1)
    scores = (call.query @ key.mT * call.query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    maps = scores.softmax(-1).nan_to_num(0.0).mean(1) * real[..., None]
    seen = (mask & real[:, None, :, None]).sum(2).double().mean(1)
    shares, norms = torch.zeros_like(seen), call.value.square().sum(-1).mean(1).sqrt()
    found = torch.zeros_like(seen, dtype=torch.bool)
    for b in range(len(seen)):
        visible = seen[b] > 0
        shares[b] = maps[b].sum(0) / real[b].sum()
        received = maps[b].sum(0) / seen[b].clamp(min=1)
        norms[b] = norms[b] / norms[b][visible].median()
        found[b] = visible & (received >= sinks.TIMES * received[visible].median()) & (norms[b] <= sinks.NORM)
    return shares, norms, found


def masked_calls():
    """A call with each kind of mask, and which pairs it lets through."""
    generator = torch.Generator().manual_seed(3)
    batch, heads, size = 2, 4, 40
    query, value = (torch.randn(batch, h, size, 8, generator=generator, dtype=torch.float64) for h in (heads, 2))
    key = torch.randn(batch, 2, size, 8, generator=generator, dtype=torch.float64)
    query[..., 0], key[:, :, [0, 7], 0] = 6.0, 4.0  # every query attends to keys 0 and 7,
    value[:, :, 0] *= 0.1  # and key 0 has small values
    every = torch.ones(batch, heads, size, size, dtype=torch.bool)
    real = torch.arange(size).expand(batch, -1) < torch.tensor([[size], [30]])
    causal, padded = every.tril(), every & real[:, None, None]
    by_head = torch.rand(batch, heads, size, size, generator=generator) < 0.8
    by_head[..., 0] = True
    added = torch.zeros(batch, 1, size, size, dtype=torch.float64).masked_fill(~padded[:, :1], torch.finfo(torch.float64).min)
    finite = torch.zeros(batch, heads, size, size, dtype=torch.float64).masked_fill(~(causal & padded), -10000.0)
    for name, mask, is_causal, seen, counted in (
        ("none", None, False, every, None),
        ("causal", None, True, causal, None),
        ("bool", causal & padded, False, causal & padded, real),
        ("added", added, False, padded, real),
        ("-10000", finite, False, causal & padded, real),
        ("by head", by_head, False, by_head, None),
    ):
        masks = {"attn_mask": mask, "is_causal": is_causal, "scale": None, "enable_gqa": True}
        yield name, TracedCall("layers.0", query, key, value, masks), seen, counted
    keys = {"attn_mask": None, "is_causal": True, "scale": None, "enable_gqa": True, "key_mask": real}
    yield "key mask", TracedCall("layers.0", query, key, value, keys), causal & padded, real


@pytest.mark.parametrize("name, call, seen, real", [*masked_calls()], ids=lambda value: value if isinstance(value, str) else "")
def test_sinks_are_those_of_the_formula(name, call, seen, real):
    every = torch.ones(call.query.shape[::2], dtype=torch.bool) if real is None else real
    shares, norms, found = dense(call, seen, every)
    got = sinks.judge(call, real, 4)
    assert found[:, 0].all() and not found[:, 7].any() and got.layer == 4
    assert torch.equal(got.sinks, found)
    torch.testing.assert_close(got.shares, shares, rtol=1e-9, atol=1e-12)
    counts = (seen & every[:, None, :, None]).sum(2).double().mean(1)
    torch.testing.assert_close(sinks._attending_queries(call, every.double(), real), counts, rtol=1e-9, atol=1e-9)
    visible = seen.any(2).any(1)
    torch.testing.assert_close(got.norms[visible], norms[visible], rtol=1e-9, atol=1e-12)
    wider = sinks.judge(replace(call, key=call.key.repeat(1, 1, 2, 1), value=call.value.repeat(1, 1, 2, 1),
                                 columns=torch.arange(40)), real, 0) if name == "none" else None  # fmt: skip
    assert wider is None or (wider.sinks.shape == found.shape and bool(wider.sinks[:, 0].all()))  # 40 further keys are no tokens


def test_padding_changes_nothing():
    decoder = DECODERS["LlamaForCausalLM"]()
    model = lively(decoder.model).eval().double()
    (alone,) = find_sinks(model, {"input_ids": torch.tensor([decoder.prompts[1]])})
    for side in ("left", "right"):
        padded = find_sinks(model, decoder.inputs(side))[1]
        moved = len(decoder.prompts[0]) - len(decoder.prompts[1]) if side == "left" else 0
        assert [sink.index - moved for sink in padded] == [sink.index for sink in alone]
        for one, other in zip(padded, alone, strict=True):
            assert one.layers == other.layers and list(one.shares.values()) == pytest.approx(list(other.shares.values()))


@pytest.mark.parametrize("case", ["clip", "llava"], indirect=True)
def test_they_have_words_and_places(case, some_sinks):
    sinks, found = find_sinks(case.model, case.inputs), explain(case.model, case.inputs)
    assert str(sinks) == repr(sinks) == sinks_line(sinks)
    named = [(row, sink) for row, sample in enumerate(sinks) for sink in sample]
    assert {sink.removed for _, sink in named} == {False}
    assert any(sink.place for _, sink in named) and any(sink.word for _, sink in named)
    ids = case.inputs["input_ids"]
    for row, sink in named:
        assert sink.reader == sink.tower and set(sink.layers) <= set(sink.shares) == set(sink.norms) == {0, 1, 2}
        if sink.place is not None:
            image, y, x = sink.place
            of_row = [number for number, owner in enumerate(found.image_samples) if owner == row]
            assert float(found.image[of_row[image]][y, x]) == float(found.relevancy[sink.tower][row, sink.index])
        if sink.word is not None:
            assert sink.word == str(int(ids[row, sink.index]))
    removed = explain(case.model, case.inputs, method=va.methods.Gradient(sinks="remove"))
    assert names(removed.sinks) == names(sinks)
    assert removed[1:].sinks == removed.sinks[1:] and removed[0].sinks == removed.sinks[:1]


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_files_pages_and_copies_keep_them(case, some_sinks, tmp_path):
    found = explain(case.model, case.inputs, method=va.methods.Gradient(sinks="remove"))
    assert va.Explanation.load(found.save(tmp_path / "one.safetensors")).sinks == found.sinks
    tensors, facts = pack(found)  # as in the shards of a data set
    assert unpack(json.loads(json.dumps(facts)), tensors.__getitem__).sinks == found.sinks
    line = sinks_line(found.sinks)
    assert "left out of the maps" in line and line in html.unescape(found.to_html())
    by_layer = explain_layers(case.model, case.inputs, per="layer", method=va.methods.Gradient(sinks="remove"))
    assert sinks_line(by_layer.sinks) in html.unescape(by_layer.to_html())
    assert LayerExplanation.load(by_layer.save(tmp_path / "layers.safetensors")).sinks == by_layer.sinks
    plain = explain(case.model, case.inputs)
    assert plain.sinks is None and "without content" not in plain.to_html()
    assert sinks_line([[], []]) == "No token receives attention without content."
    by_hand = va.Explanation(
        {"text": torch.rand(1, 4)}, sinks=[[Sink("text", 0, "text", (1,), {0: 0.1, 1: 0.5}, {0: 1.0, 1: 0.2})]]
    )
    assert sinks_line(by_hand.sinks) == "Attention without content: text 0, up to 50% of a layer."
    with pytest.raises(TypeError, match="sinks must be a list of Sinks for each sample"):
        va.Explanation({"text": torch.rand(1, 4)}, sinks=[["first"]])
    with pytest.raises(ValueError, match="sinks must have 1 samples"):
        va.Explanation({"text": torch.rand(1, 4)}, sinks=[])


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_refusals(case):
    for kind in (va.methods.Gradient, va.methods.Rollout, va.methods.Attention, va.methods.Weighted):
        with pytest.raises(ValueError, match=r"sinks must be one of \('keep', 'remove'\); got 'drop'"):
            kind(sinks="drop")
        with pytest.raises(ValueError, match=r"got 'report'. va.find_sinks\(model, inputs\) names these tokens"):
            kind(sinks="report")
    for method in ("glimpse", "gradcam", "input_gradient"):
        with pytest.raises(ValueError, match=f"sinks must be an option of method '{method}', which has freeze, of"):
            with_options(method, sinks="remove")


def test_a_model_without_an_adapter_needs_no_position(some_sinks):
    torch.manual_seed(3)
    model, inputs = lively(Moving(leave, leave)).eval(), {"x": torch.randn(2, SIZE, WIDTH)}
    found = find_sinks(model, inputs)
    assert any(found) and {sink.tower for sample in found for sink in sample} == {"tower0"}
    removed = explain(model, inputs, method=va.methods.Rollout(sinks="remove"), position=1, target=2)
    assert names(found) == names(removed.sinks)


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_an_empty_batch_has_none(case):
    empty = {name: value[:0] for name, value in case.inputs.items()}
    assert explain(case.model, empty, method=va.methods.Gradient(sinks="remove")).sinks == find_sinks(case.model, empty) == []


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("kind", ["dot", "cosine", "additive"])
def test_columns_are_left_out_of_any_score(kind, learnt):
    """Steps and maps of a call without some keys, against whole maps."""
    generator = torch.Generator().manual_seed(4)
    query, key, value, grad, out = torch.randn(5, 2, 3, 7, 6, generator=generator, dtype=torch.float64).unbind(0)
    vector = torch.randn(3, 6, generator=generator, dtype=torch.float64) if kind == "additive" else None
    sink = torch.randn(3, 1, generator=generator, dtype=torch.float64) if learnt else None
    masks = {"attn_mask": None, "key_mask": None, "is_causal": True, "scale": 0.7, "sink": sink}
    whole = TracedCall("layers.0", query, key, value, masks, kind, vector, ran=out)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, [0, 3]] = mask[1, 2] = True  # row 0 of the first sample has nothing left
    call, rows = replace(whole, left_out=mask), torch.rand(2, 2, 7, generator=generator, dtype=torch.float64)
    maps = attention_rows(whole, torch.arange(7).expand(2, -1))
    abar = without(maps, mask, "rollout").mean(1)
    assert not abar[0, 0].any() and (abar.sum(-1)[0, 1:] - maps.mean(1).sum(-1)[0, 1:]).abs().max() < 1e-12
    assert_same(call.step(rows, None, Recursion("attention")), rows @ abar)
    assert_same(call.over_row_sum(), 1 / (1 + abar.sum(-1)))
    by_gradient = without((maps * (grad @ value.mT)).relu(), mask, "gradient").mean(1)
    assert_same(call.step(rows, grad, Recursion("gradient")), rows @ by_gradient)
    assert_same(call.mean_map(grad), by_gradient)
    sums = by_gradient.sum(-1, keepdim=True)
    normalized = torch.where(sums > 0, by_gradient / sums, 0.0)
    assert_same(call.step(rows, grad, Recursion("gradient", row_normalize=True)), rows @ normalized)


def test_tokens_that_move(some_sinks):
    """Attention over tokens in another order is the same attention: so are its sinks, and the rows without them."""
    torch.manual_seed(3)
    model = lively(Moving(leave, leave)).eval().double()
    inputs = {"x": torch.randn(2, SIZE, WIDTH, dtype=torch.float64)}
    plain = {
        method: explain(model, inputs, method=with_options(method, sinks="remove"), position=1, target=2) for method in METHODS
    }
    model.before = model.after = on({1, 3}, flip)
    assert any(plain["rollout"].sinks)
    for method, want in plain.items():
        got = explain(model, inputs, method=with_options(method, sinks="remove"), position=1, target=2)
        assert_same(got.relevancy["tower0"], want.relevancy["tower0"])
        assert names(got.sinks) == names(want.sinks)


def test_attention_in_chunks_is_refused():
    call = replace(next(masked_calls())[1], chunk=True)
    for asked, words in (("remove", "sinks must be 'keep'"), (sinks.REPORT, "find_sinks does not")):
        with pytest.raises(ValueError, match=f"{words}.* in which a module attends in chunks; got attention 'layers.0'"):
            sinks.without_sinks(asked, None, call)
