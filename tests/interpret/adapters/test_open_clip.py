"""CLIP as its authors and open_clip write it, as it comes: models of the same parts, against stored maps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import vlattn_fast as va
from tests.helpers.interpret.stored_maps import Place, check
from vlattn_fast.interpret.adapters.registry import find_adapter
from vlattn_fast.interpret.probing.layout import Layouts
from vlattn_fast.interpret.probing.streams import TwoStreams

WIDTH, HEADS, PATCHES, WORDS, END = 16, 2, 6, 7, 98
METHODS = ("gradient", "rollout", "attention")


class Written(nn.Module):
    """open_clip's own attention, by torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * WIDTH**-0.5)
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        parts = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (x @ self.in_proj_weight.T).chunk(3, -1))
        return self.out_proj(functional.scaled_dot_product_attention(*parts, attn_mask=attn_mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, written: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Written() if written else nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        if isinstance(self.attn, Written):
            x = x + self.attn(normed, attn_mask)
        else:
            mask = None if attn_mask is None else attn_mask.to(x.dtype)
            x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, written: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(written) for _ in range(2)])

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, attn_mask)
        return x


class Pooler(nn.Module):
    """A head that reads the tokens by learnt queries: timm's calls attention itself, open_clip's by its part `attn`."""

    def __init__(self, probes: int, inside: bool) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(probes, WIDTH))
        if inside:
            self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        else:
            self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query = self.latent.expand(len(x), -1, -1)
        if hasattr(self, "attn"):
            return self.attn(query, x, x, need_weights=False)[0]
        parts = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, *self.kv(x).chunk(2, -1)))
        return functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


class Visual(nn.Module):
    def __init__(self, pool: str, written: bool) -> None:
        super().__init__()
        if pool.startswith("map"):
            self.attn_pool = Pooler(4 if pool == "map of four" else 1, inside=pool == "map of four")
        self.pool = pool
        self.conv1 = nn.Conv2d(3, WIDTH, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(PATCHES + 1, WIDTH))
        self.transformer, self.ln_post = Transformer(written), nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_post(self.transformer(x))
        x = self.attn_pool(x) if self.pool.startswith("map") else x
        return x[:, 1:].mean(1) if self.pool == "avg" else x[:, 0]


class Texts(nn.Module):
    def __init__(self, pool_type: str, written: bool) -> None:
        super().__init__()
        self.pool_type = pool_type
        self.token_embedding = nn.Embedding(99, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(WORDS, WIDTH))
        self.transformer, self.ln_final = Transformer(written), nn.LayerNorm(WIDTH)

    def forward(self, text: Tensor) -> Tensor:
        mask = torch.full((WORDS, WORDS), -torch.inf).triu(1).to(self.positional_embedding)
        x = self.ln_final(self.transformer(self.token_embedding(text) + self.positional_embedding, attn_mask=mask))
        read = text.argmax(-1) if self.pool_type == "argmax" else torch.full((len(text),), WORDS - 1)
        return x[torch.arange(len(x)), read]


class CLIP(nn.Module):
    """`gives`: "features" (a tuple), "dict", "bias" (a tuple with one), or "logits" as CLIP's authors give them."""

    def __init__(self, apart: bool = False, gives: str = "features", pool: str = "tok", pools: str = "argmax") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gives, self.visual = gives, Visual(pool, written=apart)
        text = Texts(pools, written=apart)
        if apart:
            self.text = text
        else:
            self.transformer, self.ln_final, self.token_embedding = text.transformer, text.ln_final, text.token_embedding
            self.positional_embedding, self.text_pool_type = text.positional_embedding, pools
            self.as_texts = lambda *, of=text: of  # no part of the model: its parts are
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))

    def encode_image(self, image: Tensor) -> Tensor:
        return functional.normalize(self.visual(image), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        return functional.normalize((self.text if hasattr(self, "text") else self.as_texts())(text), dim=-1)

    def forward(self, image: Tensor, text: Tensor) -> Any:
        images, texts, scale = self.encode_image(image), self.encode_text(text), self.logit_scale.exp()
        if self.gives == "logits":
            logits = scale * images @ texts.T
            return logits, logits.T
        if self.gives == "dict":
            return {"image_features": images, "text_features": texts, "logit_scale": scale}
        return (images, texts, scale, self.logit_bias) if self.gives == "bias" else (images, texts, scale)


def similarity(outputs: Any) -> Tensor:
    if len(outputs) == 2:
        return outputs[0].diagonal()
    images, texts, scale, *bias = outputs.values() if isinstance(outputs, dict) else outputs
    return scale * (images * texts).sum(-1) + sum(bias)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    text = torch.randint(3, 90, (2, WORDS))
    text[0, 5], text[0, 6:], text[1, 6] = END, 0, END
    return {"image": torch.randn(2, 3, 16, 24), "text": text}


@pytest.mark.parametrize(
    ("apart", "options"),
    [
        (False, {}),
        (False, {"gives": "logits"}),
        (True, {"gives": "dict"}),
        (True, {"gives": "bias", "pool": "avg", "pools": "last"}),
        (True, {"gives": "bias", "pool": "map", "pools": "last"}),  # SigLIP
    ],
)
def test_as_it_comes(apart: bool, options: dict[str, str]) -> None:
    model, batch = CLIP(apart, **options).eval(), inputs()
    ends = [6, 6] if options.get("pools") == "last" else [5, 6]
    pool = options.get("pool", "tok")
    head = "visual.attn_pool" if pool == "map" else None
    if pool == "map":
        image_row = torch.eye(1)[[0, 0]]
    elif pool == "avg":
        image_row = torch.tensor([[0.0] + [1 / PATCHES] * PATCHES] * 2, dtype=torch.float64)
    else:
        image_row = torch.eye(PATCHES + 1)[[0, 0]]
    layers = "text.transformer.resblocks" if apart else "transformer.resblocks"
    places = {"vision": Place("visual.transformer", image_row, pool=head), "text": Place(layers, torch.eye(WORDS)[ends])}
    check(model, batch, places, similarity, METHODS)


def test_its_pictures_and_words_have_maps() -> None:
    model, batch = CLIP().eval(), inputs()
    got = va.explain(model, batch)
    assert got.image.shape == (2, 2, 3) and torch.equal(got.image.flatten(1), got.relevancy["vision"][:, 1:])
    text = batch["text"]
    assert got.token_ids == [text[0, 1:5].tolist(), text[1, 1:6].tolist()]  # between the first token and the end-of-text token
    one = va.explain(model, {**batch, "image": batch["image"][:1]})  # each text with the one picture
    torch.testing.assert_close(one.image[0], got.image[0])
    assert one.image.shape == (2, 2, 3)
    swapped = va.explain(model, batch, target=[1, 0])
    alone = va.explain(model, {"image": batch["image"][:1], "text": text[1:]})
    torch.testing.assert_close(swapped.relevancy["text"][:1], alone.relevancy["text"])
    with pytest.raises(ValueError, match="inputs must contain 'text' for the similarity of an image and a text"):
        va.explain(model, {"image": batch["image"]})


def logits_of(model: CLIP, image: Tensor, text: Tensor) -> Tensor:
    images, texts, scale = model.encode_image(image), model.encode_text(text), model.logit_scale.exp()
    return (scale * images @ texts.T + (model.logit_bias if model.gives == "bias" else 0)).double()


@pytest.mark.parametrize(
    ("apart", "options"), [(False, {"gives": "logits"}), (True, {"gives": "dict"}), (True, {"gives": "bias", "pools": "last"})]
)
def test_evaluate_takes_patches_and_words_away(apart: bool, options: dict[str, str]) -> None:
    """A text keeps its length, since it has a position for each token: its last token, which is padding, fills it up."""
    model, batch = CLIP(apart, **options).eval(), inputs()
    shown, shares = va.explain(model, batch), (0.0, 0.5, 1.0)
    image = torch.stack([torch.randperm(PATCHES).float() for _ in range(2)])
    text = [torch.arange(float(len(columns))) for columns in shown.text_positions]  # the last word is removed first
    rival = {"rival": lambda *_: SimpleNamespace(image=image.view(2, 2, 3), text=text)}
    got = va.evaluate(model, [(batch, None, None)], methods=rival, tests=("deletion",), steps=shares)
    curves: dict[str, list[list[float]]] = {"image": [], "text": []}
    with torch.no_grad():
        for number in range(2):
            picture, ids = batch["image"][number : number + 1], batch["text"][number].tolist()
            masks = ((image[number] < PATCHES - int(share * PATCHES)).view(2, 3) for share in shares)
            blanked = (picture * mask.repeat_interleave(8, 0).repeat_interleave(8, 1) for mask in masks)
            rows = [logits_of(model, one, batch["text"])[0] for one in blanked]
            curves["image"].append([float(row.softmax(0)[number]) for row in rows])
            curve = []
            for share in shares:
                columns = shown.text_positions[number]
                gone = columns[len(columns) - int(share * len(columns)) :]
                short = [token for column, token in enumerate(ids) if column not in gone] + [ids[-1]] * len(gone)
                row = logits_of(model, picture, batch["text"])[0]
                row[number] = logits_of(model, picture, torch.tensor([short]))[0, 0]
                curve.append(float(row.softmax(0)[number]))
            curves["text"].append(curve)
    assert len(got.curves) == 2
    for curve in got.curves:
        assert curve["mean"] == pytest.approx(torch.tensor(curves[curve["part"]]).mean(0).tolist(), abs=1e-6)
    synergy = va.evaluate(model, [(batch, None, None)], methods=["gradient", "random"], tests=("synergy", "positive"))
    assert all(record["samples"] == 2 and record["value"] is not None for record in synergy.table)


def test_probe_reads_the_states_of_texts() -> None:
    """The same as of the tower of texts alone: each layer's states are seen, and the words are those of `explain`."""
    pytest.importorskip("sklearn")
    model, batch = CLIP().eval(), inputs()
    report = va.probe(model, [(batch, [None, None])] * 6, tests=("linguistic",))
    lengths = [record for record in report.table if record["kind"] == "length"]
    assert [(record["layer"], record["samples"], record["value"]) for record in lengths] == [(0, 12, 1.0), (1, 12, 1.0)]
    states = []
    hooks = [block.register_forward_hook(lambda *args: states.append(args[-1])) for block in model.transformer.resblocks]
    stream = TwoStreams(model, Layouts(model, find_adapter(model), None), {}, True)
    seen = stream.run(find_adapter(model).standard(batch))
    for hook in hooks:
        hook.remove()
    assert len(seen.states) == 2 and all(torch.equal(*pair) for pair in zip(seen.states, states, strict=True))
    words = seen.layout.words_of(batch["text"])
    assert [row.nonzero()[:, 0].tolist() for row in words] == va.explain(model, batch).text_positions
    with pytest.raises(ValueError, match=r"inputs must contain 'text', the texts; got \['image'\]"):
        va.probe(model, [({"image": batch["image"]}, None)])


def test_evaluate_names_the_input_that_is_missing() -> None:
    model, batch = CLIP().eval(), inputs()
    with pytest.raises(ValueError, match=r"inputs must contain 'text' for the similarity .*; got \['image'\]"):
        va.evaluate(model, [({"image": batch["image"]}, None, None)])
    with pytest.raises(TypeError, match=r"inputs must be a mapping .*; got Tensor. Pass \{'image': ...\}"):
        va.evaluate(model, [(batch["image"], None, None)])


def test_a_head_of_several_learnt_queries_is_refused() -> None:
    """CoCa reads the first of them, which nothing but its code says."""
    with pytest.raises(
        ValueError,
        match=r"position must name the explained token of tower 'vision'; got None, and after the last attention the score",
    ):
        va.explain(CLIP(pool="map of four").eval(), inputs())
