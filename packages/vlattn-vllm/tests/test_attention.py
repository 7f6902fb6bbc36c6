"""The numbers of a completion: chunks are joined, and they survive the ways between processes."""

from __future__ import annotations

import dataclasses
import json

import torch

from vlattn_vllm.attention import Attention, joined


def chunk(tokens: int, last: bool = False) -> Attention:
    received = torch.rand(2, 4, 7) if last else None
    rows = {"mass": torch.rand(tokens, 2, 4, 3), "entropy": torch.rand(tokens, 2, 4)}
    return Attention((1, 0), ("a", "b", "c"), **rows, received=received, queries=(2, 9) if last else None)


def test_both_forms_give_back_the_same() -> None:
    for attention in (
        chunk(2),
        chunk(1, last=True),
        Attention((0,), (), refused="no"),
        Attention((0,), (), mass=torch.rand(3, 1, 4, 0), seconds=2.0),
    ):
        forms = [attention.to_bytes(), json.loads(json.dumps(attention.to_dict()))]
        for form in forms[: 1 if attention.mass is not None and not attention.mass.numel() else 2]:
            got = Attention.from_dict(form)
            for field in dataclasses.fields(Attention):
                ours, wanted = getattr(got, field.name), getattr(attention, field.name)
                same = torch.equal(ours, wanted) if isinstance(wanted, torch.Tensor) else ours == wanted
                assert same, field.name


def test_compact_arrays_are_float16_or_float32_above_its_range() -> None:
    given = Attention((0,), ("a",), mass=torch.rand(2, 1, 4, 1), tokens=torch.tensor([[[70000, 3]]]))
    given = dataclasses.replace(given, received=torch.tensor([[[70000.0, 1e-3]]]), entropy=torch.rand(0, 1, 4))
    written = json.loads(json.dumps(given.to_dict(compact=True)))
    assert [written[name]["dtype"] for name in ("mass", "received", "tokens")] == ["float16", "float32", "int32"]
    got = Attention.from_dict(written)
    torch.testing.assert_close(got.mass, given.mass, rtol=2**-11, atol=2**-25)
    assert torch.equal(got.received, given.received) and torch.equal(got.tokens, given.tokens)
    assert got.entropy.shape == (0, 1, 4) and got.mass.dtype == torch.float32


def test_chunks_are_joined() -> None:
    parts = [chunk(2), chunk(1), Attention((1, 0), ("a", "b", "c"), received=torch.ones(2, 4, 7), queries=(0, 9))]
    whole = joined(parts)
    assert torch.equal(whole.mass, torch.cat([parts[0].mass, parts[1].mass])) and whole.entropy.shape == (3, 2, 4)
    assert joined([dataclasses.replace(one, seconds=2.0) for one in parts]).seconds == 6
    assert whole.maximum is None and torch.equal(whole.received, torch.ones(2, 4, 7)) and whole.queries == (0, 9)


def test_numbers_of_grounding() -> None:
    """Means over two layers and three heads; the last token has no query of its own. `maps` are of the prompt's last token and of
    the answer's first three, over a prompt of two tokens and the answer."""
    maps = torch.rand(4, 2, 3, 5).softmax(-1)
    maps = maps * (torch.arange(5) < torch.arange(2, 6)[:, None, None, None])
    mass = torch.stack([maps[..., 0], maps[..., 2:].sum(-1), maps[..., 1]], -1)
    diagonal = torch.stack([maps[n, ..., n + 1] for n in range(4)])
    received = maps[1:, ..., 2:].sum(0)
    entropy = torch.rand(4, 2, 3)
    got = Attention((0, 1), ("image", "answer", "mine"), mass, diagonal=diagonal, received_answer=received, image_entropy=entropy)
    numbers = got.grounding()
    assert [*numbers] == ["share_image", "share_answer", "attention_entropy", "diagonal", "received_less_diagonal"]
    for token in range(4):
        assert torch.isclose(numbers["share_answer"][token], maps[token, ..., 2:].mean((0, 1)).sum())
        assert torch.isclose(numbers["attention_entropy"][token], entropy[token].mean())
        if token < 3:
            later = maps[token + 1 :, ..., token + 2].mean((0, 1, 2))
            assert torch.isclose(numbers["diagonal"][token], maps[token + 1, ..., token + 2].mean())
            assert torch.isclose(numbers["received_less_diagonal"][token], later - numbers["diagonal"][token])
    assert numbers["diagonal"][3].isnan() and numbers["received_less_diagonal"][3].isnan()
    assert not Attention((0,), ()).grounding()
