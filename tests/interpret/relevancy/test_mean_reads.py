"""Reads of several rows, as a mean is: over real tokens alone, and without what the rows put on themselves."""

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import CASES
from tests.helpers.interpret.small_models import Pooled
from vlattn_fast.interpret import ADAPTERS, Adapter, Explanation, Tower, register_adapter
from vlattn_fast.interpret.relevancy.methods.registry import with_options

METHODS = ("gradient", "weighted", "rollout", "glimpse", "attention", "gradcam", "gradient:no_aggregation")
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
IDS, SHORT = torch.tensor([[2, 11, 12, 13, 14, 15, 3]]), torch.tensor([[2, 21, 22, 3]])


class Sentences(nn.Module):
    """An encoder of texts, pooled by the mean of the real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids, attention_mask).last_hidden_state
        return self.head((states * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


class Joined(Pooled):
    """Layers that attend to further keys, which are no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(16, 2, batch_first=True, **keys) for keys in ({"add_zero_attn": True}, {"add_bias_kv": True})
        )
        del self.encoder

    def encoder(self, states: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        for attend in self.layers:
            states = states + attend(states, states, states, key_padding_mask=src_key_padding_mask, need_weights=False)[0]
        return states


class Tokenizer:
    all_special_ids = (0, 2, 3)

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("no text is asked for")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{index}" for index in ids]


def padded(*texts: Tensor) -> tuple[Tensor, Tensor]:
    """The texts (1, n) as ids (B, N), and which of them are real."""
    ids = nn.utils.rnn.pad_sequence([text[0] for text in texts], batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([[text.shape[1]] for text in texts])


def inputs_of(model: nn.Module, *texts: Tensor) -> dict[str, Tensor]:
    ids, real = padded(*texts)
    return {"input_ids": ids, "seen" if isinstance(model, Pooled) else "attention_mask": real.long()}


def alike(batch: Explanation, alone: Explanation, row: int) -> None:
    """The row of a batch as the sample alone has it, and zeros on padding."""
    for tower, want in alone.relevancy.items():
        got = batch.relevancy[tower][row]
        torch.testing.assert_close(got[: want.shape[1]], want[0], rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        assert not got[want.shape[1] :].any()


@pytest.mark.filterwarnings("ignore:Tower 'tower0' attends to keys that are not its tokens")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Sentences, Joined])
def test_a_mean_leaves_padding_out(kind, method):
    model = kind().eval()
    batch = va.explain(model, inputs_of(model, IDS, SHORT), target=1, method=method, position="mean")
    for row, text in enumerate((IDS, SHORT)):
        alike(batch, va.explain(model, inputs_of(model, text), target=1, method=method, position="mean"), row)


@pytest.mark.parametrize("position", ["mean", "patch_mean", "cls_and_patch_mean"])
def test_a_records_mean_leaves_padding_out(position):
    model = Sentences().eval()
    tower = Tower("text", "bert", "encoder.layer", position, "bert_text", prefix=0 if position == "mean" else 1)
    try:
        register_adapter("Sentences", Adapter((tower,), "class"))
        batch = va.explain(model, inputs_of(model, IDS, SHORT), target=1)
        for row, text in enumerate((IDS, SHORT)):
            alike(batch, va.explain(model, inputs_of(model, text), target=1), row)
    finally:
        ADAPTERS.pop("Sentences", None)


@pytest.mark.parametrize("kind", [Sentences, Pooled])
def test_a_mean_of_capture_relevancy_leaves_padding_out(kind):
    model = kind().eval()

    def row(*texts: Tensor) -> Tensor:
        with va.nn.capture_relevancy(model) as captured:
            logits = model(**inputs_of(model, *texts))
        return captured.relevancy(logits[:, 1], position="mean")

    batch = row(IDS, SHORT)
    torch.testing.assert_close(batch[1:, :4], row(SHORT), rtol=1e-4, atol=1e-6)
    assert not batch[1, 4:].any()


def weights_seen() -> tuple[list[Tensor], object]:
    """A weighting of its own for method "weighted", and the weights of the stream that it gave, last layer first."""
    seen: list[Tensor] = []

    def weighting(stream: Tensor, branch: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        of_stream, of_branch = ((grad * x).sum(-1).abs() + 1e-9 for x in (stream, branch))
        seen.append(of_stream / (of_stream + of_branch))
        return seen[-1], 1 - seen[-1]

    return seen, weighting


@pytest.mark.parametrize(
    "method", ["gradient", "weighted", "rollout", "glimpse", "gradient:no_aggregation", "attention", "gradcam"]
)
@pytest.mark.parametrize("kind", [Sentences, Pooled])
def test_the_start_is_no_relevancy_of_the_attention(kind, method):
    model, (seen, weighting) = kind().eval(), weights_seen()
    inputs = inputs_of(model, IDS, SHORT)
    asked = va.methods.Weighted(weighting=weighting) if method == "weighted" else method
    processor = Tokenizer() if kind is Sentences else None
    got = va.explain(model, inputs, target=1, method=asked, position="mean", processor=processor)
    (tower,) = got.relevancy
    start = torch.tensor([[1 / 7] * 7, [1 / 4] * 4 + [0.0] * 3])
    if method in ("gradient", "glimpse"):
        want = start
    elif method == "rollout":
        want = start / 4  # a half in each of two layers
    elif method == "weighted":
        want = start * seen[0] * seen[1]
    else:
        assert (
            got.contribution is None and got.self_relevancy == {} and torch.equal(got.without_self(tower), got.relevancy[tower])
        )
        return
    torch.testing.assert_close(got.self_relevancy[tower], want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.without_self(tower) + want, got.relevancy[tower], rtol=1e-5, atol=1e-6)
    if kind is Sentences:
        for row, places in enumerate(got.text_positions):
            assert torch.equal(got.text[row, : len(places)], got.without_self(tower)[row, places])
        values = sorted(got.text[0].tolist(), reverse=True)
        assert [entry.value for entry in got.top(2)[:2]] == pytest.approx(values[:2])
        assert got.to_pandas().value.max() == pytest.approx(got.text.max().item())


@pytest.mark.parametrize("method", ["gradient", "glimpse"])
def test_a_faint_map_keeps_its_digits(method):
    """The map of the last layer grows with the score, also where it is a millionth of what the rows put on themselves."""
    model = Sentences().eval()
    inputs = inputs_of(model, IDS)

    def text(scale: float) -> Tensor:
        found = va.explain(
            model, inputs, target=lambda out: scale * out[:, 1], method=with_options(method, start_layer=-1), position="mean"
        )
        return found.without_self("tower0")

    faint, plain = text(1e-6), text(1.0)
    torch.testing.assert_close(faint * (1e6 if method == "gradient" else 1.0), plain, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("read", ["mean", "weights"])
@pytest.mark.filterwarnings("ignore:A part of the map belongs to later tokens")
@pytest.mark.parametrize("method", ["gradient", "weighted", "rollout"])
def test_between_towers(method, read):
    sizes = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40, max_position_embeddings=20)
    model = transformers.BartModel(transformers.BartConfig(**sizes)).eval()
    inputs = {"input_ids": IDS, "decoder_input_ids": SHORT}
    weights = torch.tensor([0.5, 0.25, 0.25, 0.0]) if read == "weights" else torch.full((4,), 0.25)
    seen, weighting = weights_seen()
    asked = va.methods.Weighted(weighting=weighting) if method == "weighted" else method
    score = lambda out: out.last_hidden_state[:, :, 3].mean(1)  # noqa: E731
    got = va.explain(model, inputs, target=score, method=asked, position={"tower1": weights if read == "weights" else "mean"})
    scale = {"gradient": torch.ones(1, 4), "rollout": torch.full((1, 4), 0.25)}.get(method)
    if (
        scale is None
    ):  # self-attention and cross-attention in turn; the encoder sees nothing of the decoder, so R_tt keeps its own
        scale = seen[-4] * seen[-2]
    torch.testing.assert_close(got.self_relevancy["tower1"], weights * scale, rtol=1e-5, atol=1e-6)
    assert list(got.self_relevancy) == ["tower1"] and torch.equal(got.without_self("tower0"), got.relevancy["tower0"])


def test_one_word_alone_is_read_as_one_token():
    model, one = Sentences().eval(), torch.tensor([[21]])
    alone = va.explain(model, inputs_of(model, one), target=1, position="mean")
    batch = va.explain(model, inputs_of(model, IDS, one), target=1, position="mean")
    (tower,) = alone.relevancy
    assert not alone.without_self(tower).any() and not batch.without_self(tower)[1].any() and batch.without_self(tower)[0].any()


def test_a_pooling_head_reads_no_token():
    case = CASES["siglip"]()
    got = va.explain(case.model, case.inputs)
    assert list(got.position) == ["text"] and torch.equal(got.without_self("vision"), got.relevancy["vision"])
    assert torch.equal(got.image.flatten(1), got.relevancy["vision"])
