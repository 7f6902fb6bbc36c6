"""The numbers of a completion: chunks are joined, and they survive the ways between processes."""

from __future__ import annotations

import dataclasses
import json

import torch

from vlattn_vllm.attention import Attention, from_bytes, joined, to_bytes


def chunk(tokens: int, last: bool = False) -> Attention:
    received = torch.rand(2, 4, 7) if last else None
    rows = {"mass": torch.rand(tokens, 2, 4, 3), "entropy": torch.rand(tokens, 2, 4)}
    return Attention((1, 0), ("a", "b", "c"), **rows, received=received, queries=(2, 9) if last else None)


def same(one: Attention, other: Attention) -> bool:
    tensors = ("mass", "entropy", "maximum", "received")
    pairs = [(getattr(one, name), getattr(other, name)) for name in tensors]
    equal = all(a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)
    return equal and (one.layers, one.groups, one.queries, one.refused) == (
        other.layers,
        other.groups,
        other.queries,
        other.refused,
    )


def test_both_forms_give_back_the_same() -> None:
    for attention in (
        chunk(2),
        chunk(1, last=True),
        Attention((0,), (), refused="no"),
        Attention((0,), (), mass=torch.rand(3, 1, 4, 0)),
    ):
        assert same(from_bytes(to_bytes(attention)), attention)
        if attention.mass is None or attention.mass.numel():
            assert same(Attention.from_dict(json.loads(json.dumps(attention.to_dict()))), attention)


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
