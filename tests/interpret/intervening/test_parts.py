"""`score_parts` and `logit_parts` next to sums that are written out for each model; `lens` next to its norm and head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vlattn_fast as va
from tests.helpers.interpret.decoder_cases import DECODERS
from tests.helpers.interpret.edited_maps import decoder, llama, made, small

CLOSE = {"rtol": 0, "atol": 1e-6}  # transformers' RMSNorm computes in float32
GROUPS = {"first": (0, 3), "later": (3, 9)}


PUSHES = ("push to first", "query push to first", "push to later", "query push to later")


def recorded(model: nn.Module, inputs: dict[str, Any], modules: dict[str, tuple[str, str]]) -> dict[str, Tensor]:
    """By name, the first input or the output of modules in one run."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, what: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            state = args[0] if what == "input" else output[0] if isinstance(output, tuple) else output
            kept[name] = state.clone()  # Falcon adds to it in place

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(name, what)) for name, (path, what) in modules.items()]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return kept


class Llama:
    """The parts of a llama's stream, and what its norms and projections make of them."""

    def __init__(self, by_head: bool) -> None:
        self.model, self.inputs = llama()
        self.inputs["attention_mask"][1, :2] = 0
        layers: Any = self.model.get_submodule("model.layers")
        modules = {"x0": ("model.layers.0.input_layernorm", "input"), "end": ("model.norm", "input")}
        for n in range(len(layers)):
            modules |= {f"x{n}": (f"model.layers.{n}.input_layernorm", "input"), f"mlp {n}": (f"model.layers.{n}.mlp", "output")}
            modules |= {f"heads {n}": (f"model.layers.{n}.self_attn.o_proj", "input")}
        self.seen, self.layers = recorded(self.model, self.inputs, modules), layers
        self.by_head = by_head

    def parts(self, below: int) -> dict[str, Tensor]:
        parts = {"embedding": self.seen["x0"]}
        for n in range(below):
            weight, heads = self.layers[n].self_attn.o_proj.weight, self.seen[f"heads {n}"].unflatten(-1, (4, 8))
            each = {f"head {n}.{h}": heads[..., h, :] @ weight[:, 8 * h : 8 * h + 8].mT for h in range(4)}
            parts |= each if self.by_head else {f"attention {n}": sum(each.values())}  # type: ignore[dict-item]
            parts[f"mlp {n}"] = self.seen[f"mlp {n}"]
        return parts

    def projected(self, layer: int, part: Tensor, name: str) -> Tensor:
        x, own = self.seen[f"x{layer}"], self.layers[layer]
        y = part * own.input_layernorm.weight * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        y = getattr(own.self_attn, name)(y).unflatten(-1, (-1, 8)).transpose(1, 2)
        cos, sin = self.model.model.rotary_emb(x, torch.arange(9)[None].expand(2, -1))  # type: ignore[operator, union-attr]
        y = apply_rotary_pos_emb(y, y, cos, sin)[0]
        return y.repeat_interleave(4 // y.shape[1], 1)

    def attention(self, query: Tensor, key: Tensor) -> Tensor:
        visible = torch.ones(9, 9).tril().bool() & self.inputs["attention_mask"].bool()[:, None, None]
        return (query @ key.mT * 8**-0.5).masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("by_head", [False, True])
def test_scores_are_sums_over_the_parts_of_keys_and_of_queries(by_head: bool) -> None:
    case = Llama(by_head)
    parts = case.parts(2)
    with torch.no_grad():
        query, key = (case.projected(2, case.seen["x2"], name) for name in ("q_proj", "k_proj"))
        maps = case.attention(query, key)
        members = torch.stack(
            [(torch.arange(9) >= start) & (torch.arange(9) < stop) for start, stop in GROUPS.values()], -1
        ).double()
        expected: dict[Any, list[Tensor]] = {name: [] for name in ("keys", "queries", *GROUPS, *((name,) for name in GROUPS))}
        for part in parts.values():
            of_key, of_query = (case.projected(2, part, name) for name in ("k_proj", "q_proj"))
            for side, scores in (("keys", 8**-0.5 * query @ of_key.mT), ("queries", 8**-0.5 * of_query @ key.mT)):
                weighted = (maps * scores).sum(-1)
                expected[side].append(weighted[..., -1])
                push = (maps * scores) @ members - weighted[..., None] * (maps @ members)
                for number, name in enumerate(GROUPS):
                    expected[name if side == "keys" else (name,)].append(push[..., -1, number])
    table = va.score_parts(case.model, case.inputs, -1, parts="heads" if by_head else "layers", groups=GROUPS)
    assert table.names == (*parts, "rest") and table.heads == (0, 1, 2, 3) and table.layer == 2
    query_push = {(name,): push for name, push in table.query_push.items()}
    for name, got in {"keys": table.keys, "queries": table.queries, **table.push, **query_push}.items():
        torch.testing.assert_close(
            got[..., :-1], torch.stack(expected[name], -1), **CLOSE, msg=lambda m, name=name: f"{name}: {m}"
        )
    torch.testing.assert_close(table.scores, table.entropy_gap, **CLOSE)
    torch.testing.assert_close(table.keys.sum(-1), table.queries.sum(-1), **CLOSE)
    torch.testing.assert_close(table.push["first"], -table.push["later"], **CLOSE)
    assert float(table.keys[..., -1].abs().max()) < 1e-6  # no biases
    one = va.score_parts(case.model, case.inputs, 2, heads=[-1, 1], parts=table.names[1] != "attention 0" and "heads" or "layers")
    torch.testing.assert_close(one.keys, table.keys[:, [1, 3]], **CLOSE)


def test_queries_are_means_over_their_tokens() -> None:
    model, inputs = llama()
    spans = [va.score_parts(model, inputs, 1, queries=(n, n + 1), groups=GROUPS) for n in (4, 6)]
    both = va.score_parts(model, inputs, 1, queries=[(4, 5), (6, 7)], groups=GROUPS)
    torch.testing.assert_close(both.keys, (spans[0].keys + spans[1].keys) / 2, **CLOSE)
    torch.testing.assert_close(both.push["later"], (spans[0].push["later"] + spans[1].push["later"]) / 2, **CLOSE)
    inputs["attention_mask"][1, :2] = 0  # which are not among the queries of the mean
    padded, real = (va.score_parts(model, inputs, 1, queries=(n, 5), groups=GROUPS) for n in (0, 2))
    torch.testing.assert_close(padded.keys[1], real.keys[1], **CLOSE)
    torch.testing.assert_close(padded.push["later"][1], real.push["later"][1], **CLOSE)
    assert not torch.allclose(padded.keys[0], real.keys[0], atol=1e-3)


def frozen_norm(part: Tensor, x: Tensor, norm: Any) -> Tensor:
    """LayerNorm of a part, with the denominator of x."""
    return (part - part.mean(-1, keepdim=True)) * norm.weight * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + norm.eps)


def test_parts_of_a_stream_that_is_normalised_after_each_sum() -> None:
    model, inputs = made("bert")
    layers: Any = model.get_submodule("bert.encoder.layer")
    modules = {"end": ("bert.encoder.layer.2.attention.self.query", "input")}
    for n in range(2):
        path = f"bert.encoder.layer.{n}"
        modules |= {f"x{n}": (f"{path}.attention.self.query", "input"), f"heads {n}": (f"{path}.attention.output.dense", "input")}
        modules |= {
            f"sum {n}": (f"{path}.attention.output.LayerNorm", "input"),
            f"end {n}": (f"{path}.output.LayerNorm", "input"),
        }
        modules |= {f"mlp {n}": (f"{path}.output.dense", "output")}
    seen = recorded(model, inputs, modules)
    with torch.no_grad():
        parts = {"embedding": seen["x0"]}
        for n in range(2):
            own = layers[n]
            parts[f"attention {n}"] = seen[f"heads {n}"] @ own.attention.output.dense.weight.mT
            parts = {name: frozen_norm(x, seen[f"sum {n}"], own.attention.output.LayerNorm) for name, x in parts.items()}
            parts[f"mlp {n}"] = seen[f"mlp {n}"]
            parts = {name: frozen_norm(x, seen[f"end {n}"], own.output.LayerNorm) for name, x in parts.items()}
        attends = layers[2].attention.self

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(-1, (4, -1)).transpose(1, 2)

        query, key = (by_head(project(seen["end"])) for project in (attends.query, attends.key))
        scale, real = query.shape[-1] ** -0.5, inputs["attention_mask"].bool()
        maps = (scale * query @ key.mT).masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
        expected = torch.stack(
            [(maps * (scale * query @ by_head(x @ attends.key.weight.mT).mT)).sum(-1) for x in parts.values()], -1
        )
    table = va.score_parts(model, inputs, 2, queries=(0, 1))
    assert table.names == (*parts, "rest")
    torch.testing.assert_close(table.keys[..., :-1], expected[:, :, 0], rtol=0, atol=1e-9)
    torch.testing.assert_close(table.scores, table.entropy_gap, rtol=0, atol=1e-9)


@pytest.mark.parametrize("by_head", [False, True])
def test_a_logit_is_the_sum_of_its_parts(by_head: bool) -> None:
    case = Llama(by_head)
    parts, x, norm = case.parts(3), case.seen["end"], case.model.get_submodule("model.norm")
    with torch.no_grad():
        gain = norm.weight * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)  # type: ignore[operator]
        of_token = case.model.get_submodule("lm_head").weight[7]
        expected = torch.stack([(part * gain)[:, -1] @ of_token for part in parts.values()], -1)
        values = {}
        for n in range(3):
            query, key = (case.projected(n, case.seen[f"x{n}"], name) for name in ("q_proj", "k_proj"))
            own = case.layers[n]
            normed = own.input_layernorm(case.seen[f"x{n}"])
            value = own.self_attn.v_proj(normed).unflatten(-1, (-1, 8)).transpose(1, 2).repeat_interleave(2, 1)
            direction = ((gain[:, -1] * of_token) @ own.self_attn.o_proj.weight).unflatten(-1, (4, 8))
            values[n] = case.attention(query, key)[:, :, -1] * (value @ direction[..., None])[..., 0]
        score = case.model(**case.inputs).logits[:, -1, 7]
    table = va.logit_parts(case.model, case.inputs, 7, parts="heads" if by_head else "layers")
    assert table.names == (*parts, "rest")
    torch.testing.assert_close(table.scores, score, **CLOSE)
    torch.testing.assert_close(table.parts[:, :-1], expected, **CLOSE)
    torch.testing.assert_close(table.parts.sum(1), score, rtol=0, atol=1e-12)
    for n in range(3):
        torch.testing.assert_close(table.sources[n], values[n], **CLOSE)


@pytest.mark.parametrize(
    "family",
    ["clip", "llava", "vit", "uniter", "dinov2", "Gemma3ForConditionalGeneration", "OPTForCausalLM", "GPTNeoXForCausalLM", "t5"],
)
def test_families(family: str) -> None:
    """What holds in every model: sums, heads in place of layers, the scores of the call, and the sources of a head."""
    tower = {"clip": "vision", "t5": "tower1"}.get(family)
    if family == "t5":
        sizes = dict(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0)
        model: Any = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).double().eval()
        inputs = {"input_ids": torch.randint(3, 50, (2, 7)), "decoder_input_ids": torch.randint(3, 50, (2, 5))}
    elif family in DECODERS:
        model, inputs = decoder(family)
    else:
        model, inputs = made(family)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    layers, heads = (va.score_parts(model, inputs, 2, parts=parts, tower=tower) for parts in ("layers", "heads"))
    torch.testing.assert_close(layers.scores, heads.scores, rtol=0, atol=1e-9)
    if family != "t5":  # whose scores have a bias of positions as well
        torch.testing.assert_close(layers.scores, layers.entropy_gap, rtol=0, atol=1e-6)
    for n in range(2):
        of_heads = [number for number, name in enumerate(heads.names) if name.startswith(f"head {n}.")]
        assert len(of_heads) == 4
        of_layer = layers.keys[..., layers.names.index(f"attention {n}")]
        torch.testing.assert_close(heads.keys[..., of_heads].sum(-1), of_layer, rtol=0, atol=1e-9)
    table = va.logit_parts(model, inputs, 0 if family == "clip" else None, tower=tower)
    torch.testing.assert_close(table.parts.sum(1), table.scores, rtol=0, atol=1e-9)
    for layer, by_token in table.sources.items():
        for head in range(4):
            share = table.parts[:, table.names.index(f"head {layer}.{head}")]
            torch.testing.assert_close(by_token[:, head].sum(-1), share, rtol=0, atol=1e-9)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_cosine_has_fixed_denominators() -> None:
    """The last MLP of a tower of CLIP writes through a norm, a projection and the cosine of both towers."""
    model, inputs = made("clip")
    modules = {"end": ("vision_model.post_layernorm", "input"), "mlp": ("vision_model.encoder.layers.2.mlp", "output")}
    modules |= {name: (f"{path}_projection", "output") for name, path in (("image", "visual"), ("text", "text"))}
    seen = recorded(model, inputs, modules)
    with torch.no_grad():
        norm, projection = (model.get_submodule(path) for path in ("vision_model.post_layernorm", "visual_projection"))
        written = projection(frozen_norm(seen["mlp"][:, 0], seen["end"], norm))
        cosine = (written * seen["text"]).sum(-1) / seen["image"].norm(dim=-1) / seen["text"].norm(dim=-1)
        expected = cosine * model.get_parameter("logit_scale").exp()
    table = va.logit_parts(model, inputs, tower="vision", parts="layers")
    torch.testing.assert_close(table.parts[:, table.names.index("mlp 2")], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["DogeForCausalLM", "Zamba2ForCausalLM", "Qwen3NextForCausalLM"])
def test_without_biases_nothing_is_left(kind: str) -> None:
    """A mask that the model computes, layers that end with a mixer, and gated attention."""
    model, inputs = small(kind)
    table = va.logit_parts(model, inputs, 7)
    assert float(table.parts[:, -1].abs().max()) < 1e-6 < 1e-3 < float(table.parts[:, 0].abs().max())


def test_scores_have_the_scale_of_the_model() -> None:
    """Granite has a factor of its own, and not 1 / sqrt(head_dim)."""
    model, inputs = small("GraniteForCausalLM")
    for layer in model.get_submodule("model.layers"):
        layer.self_attn.scaling = 0.7
    with torch.no_grad(), va.nn.capture_attention(model, layers=1) as captured:
        model(**inputs)
    scores = 0.7 * captured.query @ captured.key.mT
    maps = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
    table = va.score_parts(model, inputs, 1, queries=(2, 7))
    torch.testing.assert_close(table.scores, (maps * scores).sum(-1)[:, :, 2:].mean(-1), **CLOSE)


def test_a_layer_may_add_to_a_part_in_place() -> None:
    model, inputs = small("FalconForCausalLM")
    seen = recorded(model, inputs, {"end": ("transformer.ln_f", "input"), "mlp": ("transformer.h.0.mlp", "output")})
    table, norm = va.logit_parts(model, inputs, 7), model.get_submodule("transformer.ln_f")
    with torch.no_grad():
        expected = frozen_norm(seen["mlp"], seen["end"], norm)[:, -1] @ model.get_submodule("lm_head").weight[7]  # type: ignore[index]
    torch.testing.assert_close(table.parts[:, table.names.index("mlp 0")], expected, rtol=0, atol=1e-9)


class OnlyAttention(nn.Module):
    """A layer without an MLP; `bends`: it adds a function of the stream that is not linear."""

    def __init__(self, bends: bool) -> None:
        super().__init__()
        self.attention, self.bends = nn.MultiheadAttention(16, 4, bias=False, batch_first=True), bends

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention(x, x, x, need_weights=False)[0] if hasattr(self, "attention") else 0.0
        return x + attended + (x.tanh() if self.bends else 0.0)


@pytest.mark.parametrize("bends", [False, True])
def test_models_without_mlps(bends: bool) -> None:
    layers = [OnlyAttention(bends) for _ in range(2)]
    model = nn.Sequential(nn.Linear(5, 16, bias=False), *layers, nn.Linear(16, 7, bias=False)).double().eval()
    inputs = {"input": torch.randn(2, 6, 5, dtype=torch.float64)}
    calls = [
        lambda: va.logit_parts(model, inputs, lambda logits: logits[:, -1, 3]).parts,
        lambda: va.score_parts(model, inputs, 1, queries=(0, 6)).keys,
    ]
    for call in calls:
        if bends:
            with pytest.raises(
                ValueError, match=r"got layer 0, which .* has no MLP after its attention, and .* \(TanhBackward0\)"
            ):
                call()
        else:
            assert float(call()[..., -1].abs().max()) < 1e-12


def test_tables_and_figures() -> None:
    model, inputs = llama()
    table, logit = va.score_parts(model, inputs, 2, heads=[1, 2], groups=GROUPS), va.logit_parts(model, inputs, 7)
    frame = table.to_pandas()
    assert list(frame.columns) == ["sample", "head", "part", "keys", "queries", *PUSHES]
    line = frame[(frame["sample"] == 1) & (frame["head"] == 2) & (frame["part"] == "mlp 1")]
    assert float(line["push to later"].iloc[0]) == float(table.push["later"][1, 1, table.names.index("mlp 1")])
    assert list(logit.to_pandas().columns) == ["sample", "part", "share"] and len(logit.to_pandas()) == 2 * len(logit.names)
    for figure, bars in ((table.plot(2), 6), (table.plot(1, "query push to first", count=3), 3), (logit.plot(count=5), 5)):
        assert len(figure.axes[0].patches) == bars
    assert "largest push to first:" in repr(table) and "mlp" in repr(logit)
    with pytest.raises(ValueError, match=r"head must be among \(1, 2\); got 0"):
        table.plot(0)
    with pytest.raises(ValueError, match="kind must be one of"):
        table.plot(1, "values")


class ByMean(nn.Module):
    """Divides by a mean of sizes, and takes no root."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.abs().mean(-1, keepdim=True)


def test_what_cannot_be_split_is_named() -> None:
    model, inputs = llama()
    for call, message in [
        (lambda: va.score_parts(model, inputs, 3), "layer must be from -3 to 2 in tower 'language', which has 3; got 3"),
        (lambda: va.score_parts(model, inputs, 1, heads=4), "heads must be from -4 to 3"),
        (lambda: va.score_parts(model, inputs, 1, parts="tokens"), "parts must be one of"),
        (lambda: va.score_parts(model, inputs, 1, groups=["image"]), r"groups\['image'\]='image' has no meaning in tower"),
        (lambda: va.score_parts(model, inputs, 1, groups={"a": (0, 3), "b": (2, 5)}), "groups of a table must hold each token"),
        (lambda: va.score_parts(model, inputs, 1, queries=(8, 12)), "queries must end within tower"),
        (lambda: va.score_parts(model, inputs, 1, tower="text"), "tower must be one of"),
        (lambda: va.logit_parts(model, inputs, 7, parts="all"), "parts must be one of"),
        (lambda: va.logit_parts(model, inputs, lambda outputs: torch.ones(2)), "target must give scores that depend on the"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    layers = [OnlyAttention(bends) for bends in (False, False, True)]
    after, images = nn.Sequential(*layers, nn.Linear(16, 7)).eval(), {"input": torch.randn(2, 6, 16)}
    del layers[2].attention
    with pytest.raises(ValueError, match=r"end with a layer that attends .*; got '2' \(OnlyAttention\) after the last one"):
        va.logit_parts(after, images, lambda logits: logits[:, -1, 3])
    packed = DECODERS["Mistral3ForConditionalGeneration"]()
    with pytest.raises(ValueError, match="inputs must have one sample if a tower packs the tokens of several; got 2, and 1 in"):
        va.logit_parts(packed.model.eval(), packed.inputs("left"), 7, tower="vision")
    decoder: Any = llama()[0]
    decoder.model.layers[1].input_layernorm = ByMean().double()
    for call in (lambda: va.score_parts(decoder, inputs, 1), lambda: va.logit_parts(decoder, inputs, 7)):
        with pytest.raises(ValueError, match=r"norms that \w+ can hold fixed; got 'model.layers.1.input_layernorm' \(ByMean\)"):
            call()
    for kind in ("Gemma4ForCausalLM", "Qwen4ExpForCausalLM"):
        other, ids = small(kind)
        with pytest.raises(ValueError, match=r"model must add only outputs of attention and of MLPs .* \(\w+Backward0\)"):
            va.logit_parts(other, ids, 7)
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60)
    bloom: Any = transformers.BloomForCausalLM(config).eval()
    with pytest.raises(ValueError, match="model must attend by dot products through .*; got another score, or attention that is"):
        va.score_parts(bloom, {"input_ids": torch.randint(3, 50, (1, 6))}, 1)


class Words:
    """A tokenizer of numbers: the id of a word is its number and `more`."""

    def __init__(self, more: int = 0) -> None:
        self.more = more

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) + self.more for word in text.split()]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{token}" for token in ids]


def expected(family: str, model: Any, inputs: dict[str, Any]) -> Tensor:
    """Probabilities (L, B, N, V) of hidden states: those after layers 0 and 1, and the normed ones after the last layer."""
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        norm = model.model.language_model.norm if family == "llava" else model.model.norm
        states = [norm(state) for state in outputs.hidden_states[1:-1]] + [outputs.hidden_states[-1]]
        return torch.stack([model.lm_head(state).float().softmax(-1) for state in states])


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_states_are_read_by_the_last_norm_and_the_head(family: str) -> None:
    model, inputs = llama() if family == "llama" else made("llava")
    whole = expected(family, model, inputs)
    seen = va.lens(model, inputs, tokens=["7", 9], k=3, processor=Words())
    assert seen.layers == (0, 1, 2) and seen.tokens == {"7": 7, "9": 9}
    torch.testing.assert_close(seen.probabilities, whole[..., [7, 9]], rtol=0, atol=1e-6)
    torch.testing.assert_close(seen.probability, whole.topk(3, -1).values, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.gather(-1, seen.top), seen.probability, rtol=0, atol=1e-6)
    last = va.lens(model, inputs, layers=-1)
    assert last.layers == (2,) and torch.equal(last.top[0, ..., :3], seen.top[2])
    assert "w" in repr(seen)


def test_a_token_has_a_map_of_each_image() -> None:
    model, inputs = made("llava")
    seen = va.lens(model, inputs, tokens=[7])
    is_image = inputs["input_ids"] == 55
    assert torch.equal(seen.positions, is_image)
    for number, image in enumerate(seen.maps("7")):
        assert torch.equal(image.flatten(1), seen.probabilities[:, number, is_image[number], 0])
    frame = seen.to_pandas()
    assert len(frame) == 3 * int(is_image.sum()) and list(frame.columns[-2:]) == ["probability", "7"]
    assert len([axes for axes in seen.plot("7", number=1).axes if axes.images]) == 3


def test_what_a_lens_cannot_read_is_named() -> None:
    model, inputs = llama()
    for call, error, message in [
        (lambda: va.lens(model, inputs, tokens=["7"]), ValueError, "processor must have a tokenizer"),
        (lambda: va.lens(model, inputs, tokens=["7 8"], processor=Words()), ValueError, "tokens must be words of one token each"),
        (lambda: va.lens(model, inputs, tokens=[1.0]), TypeError, "tokens must be ids or words; got float"),
        (lambda: va.lens(model, inputs, tokens="7"), TypeError, "tokens must be a list of ids or words; got str"),
        (lambda: va.lens(model, inputs, tokens=7), TypeError, "tokens must be a list of ids or words; got int"),
        (lambda: va.lens(model, inputs, tokens=[-1]), ValueError, "tokens must be at least 0; got -1"),
        (lambda: va.lens(model, inputs, tokens=[7, 60]), ValueError, r"tokens must be ids below 60, .*; got \[7, 60\]"),
        (lambda: va.lens(model, inputs, [70, "70"], processor=Words(1)), ValueError, "tokens must have names that differ; got"),
        (lambda: va.lens(model, inputs, k=0), ValueError, "k must be"),
        (lambda: va.lens(model, inputs, layers=5), ValueError, "layers must be from -3 to 2"),
        (lambda: va.lens(model, inputs).maps("7"), ValueError, "token must be one of tokens="),
        (lambda: va.lens(model, inputs, [7]).maps("7"), ValueError, "inputs must have an image whose tokens are patches"),
    ]:
        with pytest.raises(error, match=message):
            call()
    vit, images = made("vit")
    with pytest.raises(ValueError, match="model must give logits for each of the"):
        va.lens(vit, images)
