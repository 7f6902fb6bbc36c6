"""`probe` against stored maps, on planted heads, and what its probes of states find."""

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn")

import transformers as hf

import vlattn_fast as va
from tests.helpers.interpret.decoder_cases import DECODERS, IMAGE
from tests.helpers.interpret.probe_cases import planted, scenes
from tests.helpers.interpret.stored_maps import SOFTMAX, Kept
from tests.helpers.nn import models
from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.probing import gathered
from vlattn_fast.interpret.probing.layout import Layouts
from vlattn_fast.interpret.probing.linear import fusion, linear_probe
from vlattn_fast.interpret.probing.streams import OneStream, TwoStreams
from vlattn_fast.models import UNITER, UNITERConfig

WORDS, BOXES = models.WORDS, models.BOXES
PICTURE = 98  # the id of an image token


def llava(model_type: str = "llama", **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A prompt of 2 words, 16 image tokens and 4 words; the second row has two words less and padding on the left."""
    text = {
        "model_type": model_type,
        "vocab_size": 99,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        **models.DEEP,
        **options,
    }
    vision = hf.CLIPVisionConfig(**models.DEEP, **models.PATCHES)
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=PICTURE))
    ids = torch.tensor([[1, 7, *[PICTURE] * 16, 8, 9, 10, 11], [0, 0, 1, 7, *[PICTURE] * 16, 12, 13]])
    return model, {"input_ids": ids, "attention_mask": (ids != 0).long(), **models.pixels()}


# Of each row: which tokens are text and image, the special ones, and the row that is read.
def _bert(inputs: dict[str, Tensor], image: int, prefix: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    real = torch.cat([inputs["attention_mask"].bool(), torch.ones(2, image, dtype=torch.bool)], 1)
    parts = torch.cat([torch.zeros(2, WORDS), torch.ones(2, image)], 1).masked_fill(~real, -1)
    special = torch.zeros_like(real)
    special[:, 0] = True
    for row, last in enumerate(inputs["attention_mask"].sum(1).tolist()):
        special[row, :WORDS] |= inputs["input_ids"][row] == inputs["input_ids"][row, int(last) - 1]
    special[:, WORDS : WORDS + prefix] = True
    return parts, special & (parts >= 0), [0, 0]


def _llava(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    parts = (inputs["input_ids"] == PICTURE).float().masked_fill(inputs["input_ids"] == 0, -1)
    return parts, inputs["input_ids"] == 1, [21, 21]


class _Double(Kept):
    """Softmaxes in the dtype of the model: a decoder's are in float32 otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, {**(kwargs or {}), "dtype": None} if func in SOFTMAX else kwargs)


CASES: dict[str, Any] = {
    "VisualBERT": (models.visual_bert, lambda inputs: (*_bert(inputs, BOXES)[:2], [5, 3]), "visual_bert"),  # before [SEP]
    "ViLT": (models.vilt, lambda inputs: _bert(inputs, 17, prefix=1), "vilt"),
    "UNITER": (models.uniter, lambda inputs: _bert(inputs, BOXES), "uniter"),
    "LLaVA": (llava, _llava, "model.language_model"),
    "LLaVA over Gemma 2": (partial(llava, "gemma2", head_dim=8, attn_logit_softcapping=3.0), _llava, "model.language_model"),
    "LLaVA over gpt-oss": (
        partial(llava, "gpt_oss", head_dim=8, num_local_experts=2, num_experts_per_tok=2),
        _llava,
        "model.language_model",
    ),
}
SINKS = "LLaVA over gpt-oss"  # rows of its maps sum to less than 1


def case(name: str) -> tuple[nn.Module, dict[str, Tensor], tuple[Tensor, Tensor, list[int]], Tensor]:
    """A model in double precision with uneven attention, its inputs, layout and stored maps (L, B, H, N, N)."""
    torch.manual_seed(0)
    make, lay_out, prefix = CASES[name]
    model, inputs = make()
    model = model.double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others have no float64
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1 and any(word in parameter_name for word in ("query", "key", "q_proj", "k_proj")):
            parameter.data.mul_(8)
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    eager = copy.deepcopy(model)
    if hasattr(eager, "set_attn_implementation"):
        eager.set_attn_implementation("eager")
    kept = _Double(eager)
    with torch.no_grad(), kept.watching():
        eager(**inputs)
    maps = torch.stack([each for path, each in kept.maps if path.startswith(prefix)])
    return model, inputs, lay_out(inputs), maps


def stream_of(model: nn.Module) -> OneStream:
    layouts = Layouts(model, find_adapter(model), None)
    return (OneStream if layouts.pair is None else TwoStreams)(model, layouts, {}, True)


@pytest.fixture(autouse=True)
def patches_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViLT shuffles its patches; where all are drawn, the stored maps have them in order."""
    draw = torch.multinomial

    def in_order(weights: Tensor, count: int, *args: Any, **kwargs: Any) -> Tensor:
        if weights.ndim == 1 and not args and not kwargs and len(weights) == int(count):
            return torch.arange(len(weights))
        return draw(weights, count, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", in_order)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_masses_are_those_of_stored_maps(name: str, special: bool) -> None:
    model, inputs, (parts, specials, read), maps = case(name)
    groups = parts if special else parts.masked_fill(specials, 2)
    report = va.probe(model, [(inputs, [None, None])], tests=("modality", "cross_modal"), special=special)
    assert va.probe(model, [(inputs, None)], tests=("modality", "cross_modal"), special=special).table == report.table
    rows = torch.arange(2)
    for kind, group in (("text", 0), ("image", 1), ("special", 2))[: 2 if special else 3]:
        mass = (maps * (groups == group)[:, None, None, :]).sum(-1)  # (L, B, H, N)
        expected = mass[:, rows, :, read].mean(0)  # (L, H); advanced indices come first
        cells = [[report.value("modality", i, h, kind) for h in range(4)] for i in range(len(maps))]
        torch.testing.assert_close(torch.tensor(cells, dtype=torch.float64), expected, rtol=0, atol=1e-10)
    counted = groups == 1
    if name.startswith("LLaVA"):  # behind the causal mask one patch sees the whole image, and all see the word in front of it
        counted = counted & (counted.cumsum(1) == 16)
        assert counted.sum(1).tolist() == [1, 1]
    on_text = (maps * (groups == 0)[:, None, None, :]).sum(-1).masked_fill(~counted[:, None], 0).amax(-1)
    for (layer, head), share in np.ndenumerate((on_text > 0.5).double().mean(1).numpy()):
        assert report.value("cross_modal", layer, head) == share
    total = sum(report.value("modality", 0, 0, kind) for kind in ("text", "image", "special")[: 2 if special else 3])
    assert total == pytest.approx(1.0) if name != SINKS else total < 0.99


@pytest.mark.parametrize("name", CASES)
def test_maxima_are_those_of_stored_maps(name: str) -> None:
    """Of more tokens than one call has groups, too."""
    model, inputs, (parts, _, _), maps = case(name)
    text, image = ([(row == kind).nonzero()[:, 0].tolist() for row in parts] for kind in (0, 1))
    sets = [[(text[row][:2], image[row][1:3]), (image[row], text[row])] for row in range(2)]
    with torch.no_grad():
        seen = stream_of(model).run(inputs, lambda layout: sets)
    for row in range(2):
        for index, (one, two) in enumerate(sets[row]):
            there, back = maps[:, row][:, :, one][..., two].amax((-2, -1)), maps[:, row][:, :, two][..., one].amax((-2, -1))
            torch.testing.assert_close(seen.maxima[row][index], torch.stack([there, back], -1), rtol=0, atol=1e-10)
            assert float(torch.maximum(there, back).max()) > 0  # a causal model looks back alone


# the last two have eager attention alone, whose softmax is in float32
@pytest.mark.parametrize("name", [*CASES][:-2])
def test_states_are_the_hidden_states(name: str) -> None:
    model, inputs, _, _ = case(name)
    with torch.no_grad():
        seen = stream_of(model).run(inputs)
        if name == "UNITER":
            expected = [model(**inputs).last_hidden_state]
        else:
            expected = list(model(**inputs, output_hidden_states=True).hidden_states[1:])
    expected = expected[:-1] if name == "LLaVA" else expected  # its last one is behind the norm
    states = seen.states[-1:] if name == "UNITER" else seen.states[: len(expected)]
    for one, two in zip(states, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


def test_two_streams_against_stored_maps() -> None:
    """LXMERT: words and regions in the cross-attention both ways, two regions in their own stream."""
    model, inputs = models.lxmert()
    model = model.double().eval()
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    inputs["visual_attention_mask"] = torch.ones(2, BOXES)
    inputs["visual_attention_mask"][1, 5:] = 0
    for name, parameter in model.named_parameters():
        if "query" in name or "key" in name:
            parameter.data.mul_(8)
    kept = _Double(copy.deepcopy(model))
    with torch.no_grad(), kept.watching():
        kept.model(**inputs)
    across = [each for path, each in kept.maps if "visual_attention" in path]  # the words ask first
    regions = torch.stack([each for path, each in kept.maps if "r_layers" in path or "visn_self_att" in path])
    there, back = torch.stack(across[::2]), torch.stack(across[1::2])
    words = torch.stack([each for path, each in kept.maps if ".layer." in path or "lang_self_att" in path])
    sets = [[([1, 2], [WORDS + 3]), ([WORDS], [WORDS + 4]), ([3], [WORDS, WORDS + 2]), ([1], [2, 3])]] * 2
    with torch.no_grad():
        seen = stream_of(model).run(inputs, lambda layout: sets)
    assert seen.layout.parts.tolist()[1] == [0] * 5 + [-1] * 2 + [1] * 5 + [-1] * 2 and len(seen.states) == 4
    for row in range(2):
        for index, (one, two) in ((0, ([1, 2], [3])), (2, ([3], [0, 2]))):
            ways = there[:, row][:, :, one][..., two].amax((-2, -1)), back[:, row][:, :, two][..., one].amax((-2, -1))
            torch.testing.assert_close(seen.maxima[row][index], torch.stack(ways, -1), rtol=0, atol=1e-10)
        both = torch.stack([regions[:, row, :, 0, 4], regions[:, row, :, 4, 0]], -1)
        torch.testing.assert_close(seen.maxima[row][1], both, rtol=0, atol=1e-10)
        ways = words[:, row][:, :, 1, 2:4].amax(-1), words[:, row][:, :, 2:4, 1].amax(-1)
        torch.testing.assert_close(seen.maxima[row][3], torch.stack(ways, -1), rtol=0, atol=1e-10)


def test_two_streams_are_joined_where_they_attend_to_one_another() -> None:
    model, inputs = models.lxmert()
    with torch.no_grad():
        run = stream_of(model.eval()).run(inputs, statistics=False)
        output = model(**inputs, output_hidden_states=True)
    words, regions = (states[-2:] for states in (output.language_hidden_states, output.vision_hidden_states))
    assert len(run.joint) == 2
    for joint, word, region in zip(run.joint, words, regions, strict=True):
        torch.testing.assert_close(joint, torch.cat([word, region], 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["UNITER", "VisualBERT", "LXMERT"])
def test_outputs_of_heads_are_what_the_layer_joins(name: str) -> None:
    """Called by the operator, by torch's function, and written out by hand."""
    model, inputs = (models.lxmert if name == "LXMERT" else CASES[name][0])()
    joined: list[Tensor] = []
    ends = ("attention.output.dense", "lang_self_att.output.dense")
    hooks = [
        module.register_forward_pre_hook(lambda _, args: joined.append(args[0]))
        for path, module in model.named_modules()
        if path.endswith(ends) and "r_layers" not in path and "visual_attention" not in path
    ]
    weight = torch.rand(2, WORDS + BOXES).double()
    with torch.no_grad():
        run = stream_of(model.eval()).run(inputs, statistics=False, weights=lambda layout: weight)
    for hook in hooks:
        hook.remove()
    assert run.outputs is not None and len(run.outputs) == len(joined) == len(run.states)
    for output, whole in zip(run.outputs, joined, strict=True):
        by_hand = torch.einsum("bn,bnc->bc", weight[:, : whole.shape[1]], whole.double()).view(output.shape)
        torch.testing.assert_close(output, by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["LXMERT", "CLIP, sdpa"])
def test_what_two_streams_have(name: str) -> None:
    model, inputs = models.MODELS[name]()
    inputs["input_ids"][:, -1] = 98  # CLIP's end of the text
    labels = [{"phrases": [((1, 3), 2)], "relations": [(0, 1, "one"), (2, 3, "other")]}, None]
    report = va.probe(model, [(inputs, labels)] * 6)
    notes = {row["test"]: row["note"] for row in report.table if row["kind"] is None}
    for test in ("modality", "cross_modal"):
        assert notes[test] == "words and image in two streams"
    assert notes["coreference"] == (None if name == "LXMERT" else "no attention both ways")
    layers = {row["layer"] for row in report.table if row["test"] == "relation"}
    assert layers == {None, 0, 1, 2}
    assert report.value("linguistic", 1, kind="word_order") is not None
    assert report.value("linguistic_heads", 1, 2, kind="word_order") is not None
    if name == "LXMERT":
        assert [row["layer"] for row in report.table if row["test"] == "fusion"] == [0, 1]
    else:
        assert notes["fusion"] == "no attention both ways"
    with pytest.raises(ValueError, match="'modality' is impossible .*: words and image in two streams"):
        va.probe(model, [(inputs, labels)], tests=("modality",))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("head", [0, 2])
def test_a_planted_head_is_found_and_random_ones_are_not(head: int) -> None:
    report = va.probe(planted(head), scenes(60), tests=("coreference", "cross_modal"))
    cells = {(i, h): report.value("coreference", i, h) for i in range(2) for h in range(4)}
    assert cells[0, head] > 0.95 and report.value("coreference") > 0.9
    assert all(value < 0.85 for place, value in cells.items() if place != (0, head)), cells
    shares = {(i, h): report.value("cross_modal", i, h) for i in range(2) for h in range(4)}
    assert shares[0, head] == 1.0
    assert all(value == 0.0 for place, value in shares.items() if place != (0, head)), shares


def test_shuffled_labels_are_chance() -> None:
    report = va.probe(planted(1), scenes(100), tests=("coreference",))
    whole = next(row for row in report.table if row["head"] is None)
    assert (whole["samples"], whole["left_out"], whole["chance"]) == (400, 0, 0.5)
    assert whole["value"] > 0.95 and abs(whole["control"] - 0.5) < 0.12


@pytest.mark.usefixtures("quick")
def test_a_relation_is_read_from_its_two_regions() -> None:
    """A head that goes to the same code, whichever token has it, tells regions that have one from others."""
    model = planted(1)
    model.uniter.encoder.layer[0].attention.self.key.weight.data[8:16, 20] = 0
    (inputs, labels), *_ = scenes(100)
    inputs["region_features"][:, 3] = inputs["region_features"][:, 0]
    for row, label in enumerate(labels):
        label["relations"] = [(0, 3, "alike") if row % 2 else (1, 4, "different")]
    report = va.probe(model, [(inputs, labels)], tests=("relation",))
    whole = report.table[0]
    assert (whole["samples"], whole["chance"]) == (100, 0.5) and abs(whole["control"] - 0.5) < 0.2
    assert report.value("relation", 0, 1) > 0.95


@pytest.mark.usefixtures("quick")
def test_two_related_regions_are_told_from_others() -> None:
    model = planted(1)
    model.uniter.encoder.layer[0].attention.self.key.weight.data[8:16, 20] = 0
    (inputs, labels), *_ = scenes(60)
    inputs["region_features"][:, 3] = inputs["region_features"][:, 0]
    for row, label in enumerate(labels):
        label["relations"] = [(0, 3, row % 2)]  # the class says nothing
    report = va.probe(model, [(inputs, labels)], tests=("relation", "relation_detection"))
    assert report.value("relation_detection", 0, 1) > 0.95 and report.value("relation") < 0.8
    whole = next(row for row in report.table if row["test"] == "relation_detection")
    assert (whole["samples"], whole["chance"]) == (120, 0.5)
    every = [(one, two, "on") for one in range(6) for two in range(one)]
    report = va.probe(model, [(inputs, [{"relations": every}, *labels[1:]])], tests=("relation_detection",))
    assert report.table[0]["left_out"] == 30, "no pair of the first image is without a label"


@pytest.mark.usefixtures("quick")
def test_the_class_of_a_phrase_and_its_region() -> None:
    """The planted head links a phrase to the region of the same code, and not to another one."""
    (inputs, labels), *_ = scenes(60)
    for row, label in enumerate(labels):
        (span, region), _ = label["phrases"]
        label["phrases"] = [(span, region, "same")] if row % 2 else [(span, (region + 1) % 6, "other"), ((2, 3), 0)]
    report = va.probe(planted(2), [(inputs, labels)], tests=("coreference_class",))
    assert report.value("coreference_class", 0, 2) > 0.95 and report.value("coreference_class", 1, 1) < 0.9
    assert report.table[0]["samples"] == 60, "a phrase without a class is no sample"


@pytest.mark.usefixtures("quick")
def test_a_relation_of_words_is_read_from_their_attention() -> None:
    """The planted head goes to words of the same code."""
    model = planted(1)
    codes = torch.randint(4, 12, (60, 2), generator=torch.Generator().manual_seed(0))
    codes = codes[codes[:, 0] != codes[:, 1]]
    (inputs, _), *_ = scenes(len(codes))
    ends = torch.tensor([[1, 2]]).expand(len(codes), -1)
    ids = torch.cat([ends[:, :1], codes, codes[:, :1], ends[:, 1:]], 1)
    labels = [{"word_relations": [((1, 2), (3, 4), "same"), ((1, 2), (2, 3), "other")]}] * len(codes)
    report = va.probe(model, [({**inputs, "input_ids": ids}, labels)], tests=("word_relation",))
    assert report.value("word_relation", 0, 1) > 0.95
    assert max(report.value("word_relation", 0, head) for head in (0, 2, 3)) < 0.9


def test_fusion_of_separate_and_of_mixed_states() -> None:
    random = np.random.default_rng(0)
    image = np.arange(40) < 20
    apart = random.normal(size=(40, 8)) + 20 * image[:, None]
    shuffled = random.permutation(image)
    value, control = fusion(apart, image, 0, shuffled)
    assert value == pytest.approx(1.0) and control < 0.3
    assert fusion(random.normal(size=(40, 8)), image, 0, shuffled)[0] < 0.3


@pytest.mark.slow
def test_linguistic_probes() -> None:
    """Word content and a text's class are in the word embeddings, of which the first layer's states are nearly made."""
    model = UNITER(
        UNITERConfig(
            vocab_size=40, hidden_size=32, num_attention_heads=4, intermediate_size=16, num_hidden_layers=1, region_dim=4
        )
    ).eval()
    random = np.random.default_rng(0)
    dataset = []
    for _ in range(60):
        length = int(random.integers(2, 5))
        words = random.permutation(np.arange(4, 10))[:length]
        ids = torch.tensor([[1, 10, *words.tolist(), 2]])  # the word of all texts is none to look for
        inputs = {"input_ids": ids, "region_features": torch.randn(1, 3, 4), "region_positions": torch.randn(1, 3, 7)}
        dataset.append((inputs, {"sentence": {"has_4": bool(4 in words)}}))
    report = va.probe(model, dataset, tests=("linguistic", "fusion"))
    rows = {row["kind"]: row for row in report.table if row["test"] == "linguistic"}
    assert set(rows) == {"length", "word_content", "word_order", "has_4"}
    assert rows["word_content"]["value"] > 0.85 and rows["has_4"]["value"] > 0.85
    assert rows["length"]["value"] > rows["length"]["chance"]
    assert rows["word_order"]["samples"] == 120 and rows["word_order"]["chance"] == 0.5
    assert report.value("fusion", 0) is not None and report.metadata["inputs"] == 60
    other = va.probe(model, dataset, tests=("linguistic",), position="cls")
    assert other.value("linguistic", 0, kind="has_4") < rows["has_4"]["value"]


@pytest.mark.usefixtures("quick")
def test_variants_of_a_text_and_its_heads() -> None:
    """A probe of a head tells a text from the same text with another word, if the head's values hold the word."""
    model = planted(0)
    value = model.uniter.encoder.layer[0].attention.self.value
    value.weight.data.zero_()
    value.weight.data[8:16, :8] = torch.eye(8)  # head 1 carries the codes
    (inputs, labels), *_ = scenes(100)
    for ids, label in zip(inputs["input_ids"], labels, strict=True):
        ids[1:3] = torch.tensor([4, 5])
        label["variants"] = {"another": [*ids.tolist()[:-2], 9, 2]}
    report = va.probe(model, [(inputs, labels)], tests=("linguistic", "linguistic_heads"))
    assert report.value("linguistic_heads", 0, 1, "another") > 0.9
    assert report.value("linguistic_heads", 0, 3, "another") < 0.7
    assert report.value("linguistic", 1, kind="another") > 0.95
    row = next(row for row in report.table if row["kind"] == "another")
    assert (row["samples"], row["chance"], row["left_out"]) == (200, 0.5, 0)
    shown = str(report)
    assert "linguistic_heads    another" in shown and "in head 1" in shown
    labels[3]["variants"] = {"another": [1, 2]}
    with pytest.raises(ValueError, match="as many ids as the input's text, 4; got 2 ids for 'another' in input 3"):
        va.probe(model, [(inputs, labels)], tests=("linguistic",))


@pytest.mark.usefixtures("quick")
def test_a_text_alone() -> None:
    model, inputs = models.llama("sdpa")
    report = va.probe(model, [(inputs, [None, None])] * 6)
    notes = {row["test"]: row["note"] for row in report.table}
    assert notes["modality"] == notes["cross_modal"] == "no image tokens"
    assert notes["fusion"] == "no words together with image tokens"
    assert notes["coreference"] == "no phrases in the labels" and notes["relation"] == "no relations in the labels"
    assert report.value("linguistic", 1, kind="word_order") is not None


def test_a_linear_probe_parts_no_input() -> None:
    """Samples of one input are alike and labels are random by input: a probe that saw others of the same input would know."""
    random = np.random.default_rng(0)
    inputs = np.repeat(np.arange(60), 4)
    features, labels = random.normal(size=(60, 100))[inputs], random.integers(0, 2, 60)[inputs]
    assert abs(linear_probe(features, labels, inputs, 0).value - 0.5) < 0.2
    assert linear_probe(features, labels, np.arange(240), 0).value > 0.9
    assert linear_probe(features[:12], labels[:12], inputs[:12], 0).note in ("fewer than 5 inputs", "only one class")


def test_labels_are_not_shuffled_as_the_folds_are() -> None:
    """Labels that go in turns: shuffled by the folds' permutation, each fold would have one class that the others lack."""
    features = np.random.default_rng(0).normal(size=(200, 4))
    assert linear_probe(features, [number % 5 for number in range(200)], range(200), 0).control > 0.1


@pytest.mark.usefixtures("quick")
def test_what_is_drawn_does_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[Any]] = {"linear_probe": [], "fusion": []}

    def watched(name: str) -> Any:
        inner = getattr(gathered, name)

        def call(*arguments: Any, **options: Any) -> Any:
            drawn[name].append(arguments)
            return inner(*arguments, **options)

        return call

    for name in drawn:
        monkeypatch.setattr(gathered, name, watched(name))
    tests = ("coreference", "fusion", "linguistic")
    [(inputs, labels)] = scenes(20)
    va.probe(planted(1), [(inputs, labels)], tests=tests)
    whole = {name: calls.copy() for name, calls in drawn.items()}
    alone = [({name: value[row : row + 1] for name, value in inputs.items()}, label) for row, label in enumerate(labels)]
    va.probe(planted(1), alone, tests=tests)
    for one, two in zip(whole["linear_probe"], drawn["linear_probe"][len(whole["linear_probe"]) :], strict=True):
        np.testing.assert_allclose(one[0], two[0], atol=1e-5)
    shuffles = [arguments[3].tolist() for arguments in whole["fusion"]]
    assert shuffles == [arguments[3].tolist() for arguments in drawn["fusion"][len(shuffles) :]]
    assert len({tuple(shuffle) for shuffle in shuffles}) > 5, "all texts and images have the same shuffled control"


@pytest.mark.usefixtures("quick")
def test_a_model_without_an_adapter_says_its_parts() -> None:
    class Joined(models.Joined):
        pass

    torch.manual_seed(0)
    model = Joined(True).eval()
    inputs = {"input_ids": torch.randint(99, (2, 5)), "features": torch.randn(2, 3, 20)}
    dataset = [(inputs, [{"phrases": [((1, 3), 2)]}, None])] * 10
    options: dict[str, Any] = {"modality": {"features": "image"}, "tests": ("modality", "coreference", "fusion")}
    report = va.probe(model, dataset, parts=lambda inputs: torch.tensor([0] * 5 + [1] * 3), **options)
    assert report.value("modality", 1, 3, "text") + report.value("modality", 1, 3, "image") == pytest.approx(1.0)
    assert report.table[16]["samples"] == 20  # ten phrases, each with another region
    with pytest.raises(ValueError, match="model must have an adapter with one stream; got Joined. Pass parts="):
        va.probe(model, dataset, **options)
    with pytest.raises(ValueError, match=r"parts must return \(N\) or \(B, N\) = \(2, 8\); got \(7,\)"):
        va.probe(model, dataset, parts=lambda inputs: torch.zeros(7), **options)
    with pytest.raises(ValueError, match=r"parts must return 0 \(text\), 1 \(image\) or -1 \(neither\); got \[0, 5\]"):
        va.probe(model, dataset, parts=lambda inputs: torch.tensor([0] * 7 + [5]), **options)


@pytest.mark.parametrize(
    "name", ["Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration", "Idefics2ForConditionalGeneration"]
)
def test_image_tokens_that_are_learnt_queries(name: str) -> None:
    """They come from no input, but from attention to the image."""
    decoder = DECODERS[name]()
    model, inputs = decoder.model.eval(), decoder.inputs()
    report = va.probe(model, [(inputs, [None, None])], tests=("modality", "cross_modal"))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True)
    maps = getattr(outputs, "attentions", None) or outputs.language_model_outputs.attentions
    real = inputs["attention_mask"].bool()
    read = real.sum(1) - 1  # padding is on the right
    for kind, tokens in (("text", real & (inputs["input_ids"] != IMAGE)), ("image", inputs["input_ids"] == IMAGE)):
        for (layer, head), value in np.ndenumerate(
            torch.stack([(each * tokens[:, None, None]).sum(-1)[[0, 1], :, read].mean(0) for each in maps]).numpy()
        ):
            assert report.value("modality", layer, head, kind) == pytest.approx(float(value), abs=1e-5)


def test_the_row_of_a_padded_text_is_the_one_that_is_pooled() -> None:
    """SigLIP pools the last position, of padding or not."""
    config = hf.SiglipTextConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=60)
    model, mask = hf.SiglipTextModel(config), torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    inputs = {"input_ids": torch.randint(5, 50, (2, 9)), "attention_mask": mask}
    layouts = Layouts(model, find_adapter(model), None)
    assert layouts.of(inputs, (2, 9)).position.tolist() == [8, 8]
    for other in ({}, {"input_ids": inputs["input_ids"][:1]}):
        with pytest.raises(ValueError, match="inputs must contain 'input_ids'"):
            layouts.of(other, (2, 9))
