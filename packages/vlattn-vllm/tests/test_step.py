"""A batch in a worker, without vLLM: what a layer hands over, and what leaves."""

from __future__ import annotations

import math
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlattn_fast import paged_attention_statistics
from vlattn_vllm import blocks, steering, worker
from vlattn_vllm.ask import STATISTICS, check_ask, groups_of_tokens, inside
from vlattn_vllm.steering import Edits
from vlattn_vllm.worker import Asking, Step, layer_number, refusal, window

SIZE, HEADS, KEY_HEADS, HEAD_DIM = 4, 4, 2, 8
IMPL = SimpleNamespace(scale=0.5, logits_soft_cap=0, sliding_window=-1, attn_type="decoder")


def transposed(key: Tensor, isa: str) -> Tensor:
    return key[:, 0].T.flatten()


def tiles(key: Tensor, isa: str) -> Tensor:
    """Pairs of features of one token lie side by side, as tiles of matrix units want them."""
    return key[:, 0].unflatten(1, (-1, 2)).transpose(0, 1).flatten()


OF_VALUES = {transposed: tiles, tiles: transposed}


@pytest.fixture(params=[transposed, tiles])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(blocks, "_written", request.param)
    monkeypatch.setattr(blocks, "_values_written", OF_VALUES[request.param])
    blocks._order.cache_clear()
    yield request.param
    blocks._order.cache_clear()


class Batch:
    """Requests with random keys in a paged cache, some of which run."""

    def __init__(self, order: Any, lengths: list[int], queries: list[int]) -> None:
        self.lengths, self.queries = lengths, queries
        self.keys = [torch.randn(length, KEY_HEADS, HEAD_DIM) * 2 for length in lengths]
        self.query = torch.randn(sum(queries), HEADS, HEAD_DIM)
        most = -(-max(lengths) // SIZE)
        numbers = torch.randperm(most * len(lengths) + 3)
        self.table = numbers[: most * len(lengths)].view(len(lengths), most).int()
        self.cache = torch.full((len(numbers), KEY_HEADS, SIZE, 2 * HEAD_DIM), torch.nan)
        for keys, row in zip(self.keys, self.table, strict=True):
            for number in range(-(-len(keys) // SIZE)):
                part = torch.zeros(SIZE, KEY_HEADS, HEAD_DIM)
                some = keys[number * SIZE : (number + 1) * SIZE]
                part[: len(some)] = some
                for head in range(KEY_HEADS):
                    block = self.cache[row[number], head].view(-1)
                    block[: SIZE * HEAD_DIM] = order(part[:, head : head + 1], "")
        starts = torch.tensor([0, *queries]).cumsum(0).int()
        self.metadata = SimpleNamespace(
            block_table=self.table, seq_lens=torch.tensor(lengths).int(), query_start_loc=starts, causal=True
        )

    def with_values(self, order: Any) -> list[Tensor]:
        """Of each request (keys, key heads, D); only edits read them."""
        values = [torch.randn_like(keys) for keys in self.keys]
        for some, row in zip(values, self.table, strict=True):
            for number in range(-(-len(some) // SIZE)):
                part = torch.full((SIZE, KEY_HEADS, HEAD_DIM), torch.nan)
                part[: len(some[number * SIZE : (number + 1) * SIZE])] = some[number * SIZE : (number + 1) * SIZE]
                for head in range(KEY_HEADS):
                    block = self.cache[row[number], head]
                    if order is None:
                        block[:, HEAD_DIM:] = part[:, head]
                    else:
                        block.view(-1)[SIZE * HEAD_DIM :] = OF_VALUES[order](part[:, head : head + 1], "")
        return values

    def see(self, step: Step, number: int = 0, impl: Any = IMPL, name: str = "", **of_layer: Any) -> None:
        layer = SimpleNamespace(layer_name=name or f"model.layers.{number}.attn", isa="any", **of_layer)
        self.out = torch.zeros_like(self.query)
        step.see(impl, layer, self.query, self.cache, self.metadata, self.out)

    def maps(self, number: int, edited: Any = None, window: int = 99) -> Tensor:
        """(queries, heads, keys) of one request; `edited` takes the logits and returns those with edits."""
        first = sum(self.queries[:number])
        query = self.query[first : first + self.queries[number]]
        logits = torch.einsum("nhd,mhd->nhm", query, self.keys[number].repeat_interleave(HEADS // KEY_HEADS, 1)) * IMPL.scale
        length = self.lengths[number]
        positions = torch.arange(length - self.queries[number], length)[:, None, None]
        logits = logits if edited is None else edited(logits)
        hidden = (torch.arange(length) > positions) | (torch.arange(length) <= positions - window)
        return logits.masked_fill(hidden, -torch.inf).softmax(-1)


class OnGpu(Batch):
    """The same as the layers of GPUs have it: a token's key in front of its value, and batches that are filled up."""

    def __init__(self, lengths: list[int], queries: list[int]) -> None:
        super().__init__(lambda key, isa: key.flatten(), lengths, queries)
        keys, self.cache = self.cache.flatten(2)[..., : SIZE * HEAD_DIM].unflatten(2, (SIZE, HEAD_DIM)), self.cache.clone()
        self.cache[..., :HEAD_DIM], self.cache[..., HEAD_DIM:] = keys, torch.nan
        self.query = torch.cat([self.query, torch.full((3, HEADS, HEAD_DIM), torch.nan)])

    def see(self, step: Step, number: int = 0, impl: Any = IMPL) -> None:
        layer, impl = SimpleNamespace(layer_name=f"model.layers.{number}.attn"), SimpleNamespace(**vars(impl))
        impl.sliding_window = (-1, -1)
        self.out = torch.zeros_like(self.query)
        step.see(impl, layer, self.query, self.cache, self.metadata, self.out)


def asking(prompt: int, counted: int = 0, rank: int = 0, pictures: Any = (), **ask: Any) -> Asking:
    most, usual = prompt + 20, {} if ask.get("statistics") == [] else {"layers": [0]}
    checked = check_ask({**usual, **ask}, 2, 2 * HEADS, prompt, pictures, most)
    edits = Edits(checked.steer, most, range(rank * HEADS, (rank + 1) * HEADS)) if checked.steer else None
    return Asking(checked, prompt, groups_of_tokens(checked, most), edits, counted)


def begun(batch: Batch, requests: dict[str, Asking], *names: str) -> Step:
    """A step of the batch, whose requests have these names."""
    names = names or tuple(requests)
    before = [length - queries for length, queries in zip(batch.lengths, batch.queries, strict=True)]
    running = SimpleNamespace(req_ids=[*names], num_computed_tokens_cpu=before)
    return Step(requests, running, dict(zip(names, batch.queries, strict=True)), HEADS)


def same(columns: Tensor) -> Tensor:
    """Of one rank."""
    return columns


BOTH = ["mass", "received"]


def test_a_batch_has_the_numbers_of_its_maps(order: Any) -> None:
    """A whole prompt, the middle of one, a token of an answer that does not ask, and one that does, of one layer."""
    batch = Batch(order, [9, 6, 11, 10], [9, 4, 1, 1])
    spans = {"groups": {"a": [[0, 3]], "b": [[4, None]]}}
    requests = {
        "whole": asking(9, statistics=BOTH, **spans),
        "middle": asking(8, statistics=["mass"], **spans),
        "token": asking(7, layers=[1, 0], statistics=["entropy", "maximum", "diagonal"]),
    }
    step = begun(batch, requests, "whole", "middle", "silent", "token")
    batch.see(step)
    batch.query = -batch.query
    batch.see(step, 1)
    ones = batch.maps(3)[0]
    batch.query = -batch.query
    got = step.numbers(same)
    assert set(got) == {"whole", "token"}, "no token is chosen in the middle of a prompt"
    maps = batch.maps(0)
    mass = torch.stack([maps[-1, :, :3].sum(-1), maps[-1, :, 4:].sum(-1)], -1)
    torch.testing.assert_close(got["whole"].mass, mass[None, None])
    torch.testing.assert_close(got["whole"].received, maps.sum(0)[None])
    assert got["whole"].queries == (0, 9) and got["whole"].entropy is None and got["token"].received is None
    token = torch.stack([ones, batch.maps(3)[0]])
    torch.testing.assert_close(got["token"].entropy, -token.xlogy(token).sum(-1)[None])
    torch.testing.assert_close(got["token"].maximum, token.amax(-1)[None])
    torch.testing.assert_close(got["token"].diagonal, token[..., -1][None])


def test_a_prompt_in_chunks_sums_what_its_answer_gets(order: Any) -> None:
    """Of which its prompt has nothing, and no number; its queries count."""
    batch = Batch(order, [6, 9], [6, 9])
    requests = {"middle": asking(8, statistics=["received_answer"]), "end": asking(9, statistics=["received_answer"])}
    step = begun(batch, requests)
    batch.see(step)
    got = step.numbers(same)
    assert [got[name].queries for name in requests] == [(0, 6), (0, 9)]
    assert all(one.received is one.received_answer is one.mass is None and not one.refused for one in got.values())


def test_queries_that_ran_before_count_once(order: Any) -> None:
    """A preempted request of 10 tokens, whose first 7 queries are in `received`, runs again; then once more as far as token 5."""
    batch = Batch(order, [10], [10])
    one = asking(6, counted=7, statistics=[*BOTH, "received_answer"])
    step = begun(batch, {"one": one})
    batch.see(step)
    got = step.numbers(same)["one"]
    torch.testing.assert_close(got.received, batch.maps(0)[7:, :, :6].sum(0)[None])
    torch.testing.assert_close(got.received_answer, batch.maps(0)[7:, :, 6:].sum(0)[None])
    assert got.queries == (7, 10) and one.counted == 10
    batch = Batch(order, [8], [8])
    step = begun(batch, {"one": one})
    batch.see(step)
    got = step.numbers(same)["one"]
    assert got.received is None and got.mass is not None and one.counted == 10


def test_requests_of_a_batch_have_groups_of_their_own(order: Any) -> None:
    """One, three, and one whose tokens from the sixth on are in no group."""
    batch = Batch(order, [9, 6, 11], [9, 1, 1])
    requests = {
        "one": asking(9, groups={"a": [[0, 3]]}),
        "three": asking(5, groups={"a": [[0, 2]], "b": [[2, 3]], "c": [[3, None]]}),
        "short": asking(5, groups={"a": [[0, None]]}),
    }
    requests["short"].groups = requests["short"].groups[:5]
    step = begun(batch, requests)
    batch.see(step)
    got = step.numbers(same)
    ends = {"one": [(0, 3)], "three": [(0, 2), (2, 3), (3, 6)], "short": [(0, 5)]}
    for number, (name, spans) in enumerate(ends.items()):
        mass = torch.stack([batch.maps(number)[-1, :, start:end].sum(-1) for start, end in spans], -1)
        torch.testing.assert_close(got[name].mass, mass[None, None])


@pytest.mark.parametrize("seen", [99, 6])
def test_entropy_over_image_tokens(order: Any, seen: int) -> None:
    """In a layer that sees all keys and in one with a window, which is 0 where it sees no image; with an edit, too."""
    batch = Batch(order, [13, 11, 12, 6], [13, 1, 2, 1])
    batch.with_values(order)
    pictures = ((2, 4), (8, 10)), ((0, 3),), ((1, 9),)
    more = [edit(keys=[2, 8], weight=3.0)]
    one = asking(10, pictures=pictures[0], statistics=["image_entropy", "received"])  # all its queries go to the operator
    two = asking(10, pictures=pictures[1], statistics=["entropy", "image_entropy"])
    three = asking(10, pictures=pictures[2], statistics=["image_entropy"], steer=more)
    step = begun(batch, {"one": one, "two": two, "three": three, "plain": asking(5, statistics=["entropy"])})
    batch.see(step, impl=SimpleNamespace(**{**vars(IMPL), "sliding_window": -1 if seen == 99 else seen}))
    got = step.numbers(same)

    def edited(logits: Tensor) -> Tensor:
        return logits + math.log(3) * ((torch.arange(12) >= 2) & (torch.arange(12) < 8))

    for number, name in enumerate(("one", "two", "three")):
        last = batch.maps(number, edited if name == "three" else None, seen)[-1].double()
        on_image = last[:, torch.cat([torch.arange(*span) for span in pictures[number]])]
        parts = on_image / on_image.sum(-1, keepdim=True) if on_image.any() else on_image
        torch.testing.assert_close(got[name].image_entropy[0, 0].double(), -parts.xlogy(parts).sum(-1), rtol=1e-5, atol=1e-6)
        assert got[name].image_entropy.any() == (seen == 99 or name != "two") and got[name].mass is None
    assert got["plain"].image_entropy is got["one"].entropy is None and got["two"].entropy is not None


def test_layers_of_gpus_hand_over_keys_in_front_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Triton kernel, which a GPU takes, in Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(worker, "paged_attention_statistics", partial(paged_attention_statistics, backend="triton"))
    batch = OnGpu([9, 6], [9, 1])
    of_image = ["maximum", "image_entropy"]
    step = begun(batch, {"one": asking(9, statistics=BOTH), "two": asking(5, pictures=[(1, 4)], statistics=of_image)})
    batch.see(step)
    got = step.numbers(same)
    maps = batch.maps(0)
    torch.testing.assert_close(got["one"].received, maps.sum(0)[None])
    parts = batch.maps(1)[0, :, 1:4] / batch.maps(1)[0, :, 1:4].sum(-1, keepdim=True)
    torch.testing.assert_close(got["two"].image_entropy[0, 0], -parts.xlogy(parts).sum(-1))
    torch.testing.assert_close(got["two"].maximum[0, 0], batch.maps(1)[0].amax(-1))
    assert [window(SimpleNamespace(sliding_window=kept)) for kept in (-1, 16, (-1, -1), (15, 0))] == [None, 16, None, 16]


def test_ranks_have_parts_of_the_heads(order: Any) -> None:
    batch = Batch(order, [9], [9])
    step = begun(batch, {"one": asking(9, statistics=BOTH)})
    batch.see(step)
    got = step.numbers(lambda columns: torch.cat([columns, 2 * columns]))["one"]
    assert got.mass.shape == (1, 1, 2 * HEADS, 3) and got.received.shape == (1, 2 * HEADS, 9)
    torch.testing.assert_close(got.received[:, HEADS:], 2 * got.received[:, :HEADS])


def latent_layer(**fields: Any) -> Any:
    """Whose heads make keys of 6 features of a latent of 10, beside 2 rotated ones."""
    impl = SimpleNamespace(scale=0.5)
    return SimpleNamespace(**{"layer_name": "model.layers.0.attn", "impl": impl, "W_UK_T": torch.randn(HEADS, 6, 10), **fields})


def test_latent_attention_has_the_numbers_of_the_keys_that_it_stands_for() -> None:
    """A token of an answer and two whole prompts, one of which asks; blocks beside the requests' are not numbers."""
    lengths, queries, layer = [7, 9, 6], [1, 9, 6], latent_layer()
    latents, table = [torch.randn(length, 12) for length in lengths], torch.randperm(9).view(3, 3)
    cache = torch.full((9, SIZE, 12), torch.nan)
    for each, row in zip(latents, table, strict=True):
        whole = torch.zeros(3 * SIZE, 12)
        whole[: len(each)] = each
        cache[row] = whole.view(3, SIZE, 12)
    query = torch.randn(sum(queries), HEADS, 8)
    requests = {"token": asking(5), "prompt": asking(9, pictures=[(2, 7)], statistics=[*BOTH, "image_entropy"])}
    step = begun(SimpleNamespace(lengths=lengths, queries=queries), requests, "token", "prompt", "silent")
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    decode = SimpleNamespace(block_table=table[:1], seq_lens=torch.tensor([7]).int())
    metadata = SimpleNamespace(
        num_decodes=1, num_prefills=2, decode=decode, prefill=SimpleNamespace(block_table=table[1:]), query_start_loc=starts
    )
    metadata.causal = True
    step.see(None, layer, query, cache, metadata, torch.zeros(sum(queries), HEADS * 6))
    got = step.numbers(same)
    for number, name in enumerate(("token", "prompt")):
        keys = torch.einsum("ml,hpl->mhp", latents[number][:, :10], layer.W_UK_T)
        keys = torch.cat([keys, latents[number][:, None, 10:].expand(-1, HEADS, -1)], -1)
        logits = torch.einsum("nhd,mhd->nhm", query[starts[number] : starts[number + 1]], keys) * 0.5
        positions = torch.arange(lengths[number] - queries[number], lengths[number])[:, None, None]
        maps = logits.masked_fill(torch.arange(lengths[number]) > positions, -torch.inf).softmax(-1)
        torch.testing.assert_close(got[name].mass[0, 0].sum(-1), torch.ones(HEADS))
        torch.testing.assert_close(got[name].mass[0, 0, :, :2].sum(-1), maps[-1, :, : (5, 9)[number]].sum(-1))
    torch.testing.assert_close(got["prompt"].received[0], maps.sum(0))
    parts = maps[-1, :, 2:7] / maps[-1, :, 2:7].sum(-1, keepdim=True)
    torch.testing.assert_close(got["prompt"].image_entropy[0, 0], -parts.xlogy(parts).sum(-1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"impl": SimpleNamespace(scale=0.5, is_sparse=True)}, "keys that an indexer chooses"),
        ({"sliding_window": 8}, "within a window"),
        ({"W_UK_T": None}, "no projection of latents"),
    ],
)
def test_latent_attention_of_another_kind_is_refused_by_name(fields: Any, words: str) -> None:
    step = begun(SimpleNamespace(lengths=[7], queries=[1]), {"one": asking(5)})
    metadata = SimpleNamespace(decode=None, prefill=None, causal=True)
    step.see(None, latent_layer(**fields), torch.randn(1, HEADS, 8), torch.zeros(3, SIZE, 12), metadata, torch.zeros(1))
    got = step.numbers(same)["one"]
    assert words in got.refused and "model.layers.0.attn" in got.refused and got.is_empty()


@pytest.mark.parametrize(
    ("impl", "metadata", "words"),
    [
        ({"alibi_slopes": torch.ones(4)}, {}, "ALiBi"),
        ({"sinks": torch.ones(4)}, {}, "sinks"),
        ({}, {"causal": False}, "not causal"),
        ({}, {"dynamic_causal": torch.ones(1)}, "not causal"),
        ({}, {"mm_prefix_query_range_tensor": torch.ones(1)}, "not causal"),
    ],
)
def test_what_the_operator_does_not_compute_is_refused_by_name(order: Any, impl: Any, metadata: Any, words: str) -> None:
    batch = Batch(order, [9], [9])
    vars(batch.metadata).update(metadata)
    step = begun(batch, {"one": asking(9)})
    batch.see(step, impl=SimpleNamespace(**{**vars(IMPL), **impl}))
    got = step.numbers(same)["one"]
    assert words in got.refused and got.mass is None


def test_another_backend_is_refused_by_name() -> None:
    assert "must be one of CPU_ATTN, FLASH_ATTN, TRITON_ATTN; got SimpleNamespace" in refusal(
        SimpleNamespace(), SimpleNamespace(), SimpleNamespace()
    )


def test_the_number_of_a_layer() -> None:
    assert layer_number("language_model.model.layers.12.self_attn.attn") == 12


def scheduled(new: list[Any] = (), running: Any = (), finished: Any = ()) -> Any:  # type: ignore[assignment]
    return SimpleNamespace(
        scheduled_new_reqs=list(new), num_scheduled_tokens=dict.fromkeys(running, 1), finished_req_ids=set(finished)
    )


def edit(**fields: Any) -> dict[str, Any]:
    return {"layers": [0], "weight": 0, **fields}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_edited_rows_are_those_of_edited_maps(order: Any, monkeypatch: pytest.MonkeyPatch, rank: int, at_once: int) -> None:
    """A prompt with a cut and more weight, a token of an answer with a head of the second rank, and one without edits."""
    monkeypatch.setattr(steering, "_AT_ONCE", at_once)
    batch = Batch(order, [9, 10, 7], [6, 1, 2])
    values = batch.with_values(order)
    asked = [name for name in STATISTICS if name != "image_entropy"]
    spans = {"groups": {"a": [[0, 3]], "b": [[4, None]]}, "statistics": asked}
    cut = edit(keys=[1, 3], queries=[[4, 6], [7, None]]), edit(keys="answer", heads=[1, 5], weight=3.0)
    requests = {
        "prompt": asking(8, rank=rank, steer=cut, **spans),
        "token": asking(7, rank=rank, steer=[edit(keys=[0, 4], heads=[5])], statistics=["mass"]),
        "plain": asking(7, statistics=["mass"]),
    }
    step = begun(batch, requests, "prompt", "token", "plain")
    batch.see(step)
    got = step.numbers(same)

    def prompts(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[1:3, :, 1:3] = logits[4:, :, 1:3] = -torch.inf
        logits[:, 1, 8:] += math.log(3)  # head 1 of the first rank, and 5 of the second
        return logits

    def tokens(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, 1, :4] = -torch.inf if rank else logits[:, 1, :4]
        return logits

    maps = batch.maps(0, prompts), batch.maps(1, tokens)
    wanted = [torch.einsum("nhm,mhd->nhd", m, v.repeat_interleave(2, 1)) for m, v in zip(maps, values, strict=False)]
    torch.testing.assert_close(batch.out[:7], torch.cat(wanted))
    assert not batch.out[7:].any() and (maps[0] - batch.maps(0)).abs().amax() > 0.1
    last = maps[0][-1]
    torch.testing.assert_close(got["prompt"].mass[0, 0], torch.stack([last[:, :3].sum(-1), last[:, 4:].sum(-1)], -1))
    torch.testing.assert_close(got["prompt"].entropy[0, 0], -last.xlogy(last).sum(-1))
    torch.testing.assert_close(got["prompt"].maximum[0, 0], last.amax(-1))
    torch.testing.assert_close(got["prompt"].diagonal[0, 0], last[:, -1])
    torch.testing.assert_close(got["prompt"].received[0], maps[0].sum(0)[:, :8])
    torch.testing.assert_close(got["prompt"].received_answer[0], maps[0].sum(0)[:, 8:])
    torch.testing.assert_close(got["token"].mass[0, 0, :, 1], maps[1][0, :, :7].sum(-1))
    torch.testing.assert_close(got["plain"].mass[0, 0, :, 1], batch.maps(2)[-1, :, :7].sum(-1))


@pytest.mark.parametrize(("length", "before"), [(15, 2), (13, 1)])
def test_an_edit_in_a_window_reads_no_block_before_it(length: int, before: int) -> None:
    """As on a GPU. Blocks before the window belong to other requests by then; here they are not numbers. The second prompt's
    window begins with the last token of a block."""
    batch = OnGpu([9, length], [9, 2])
    values = batch.with_values(None)[1]
    batch.cache[batch.table[1, :before].long()] = torch.nan
    step = begun(batch, {"one": asking(9, steer=[edit(keys=[11, 12])], statistics=[])}, "plain", "one")
    layer = SimpleNamespace(layer_name="model.layers.0.attn")
    impl = SimpleNamespace(**{**vars(IMPL), "sliding_window": (4, 0)})
    out = torch.zeros_like(batch.query)
    step.see(impl, layer, batch.query, batch.cache, batch.metadata, out)

    def cut(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., 11] = -torch.inf
        return logits

    maps = batch.maps(1, cut, window=5)
    torch.testing.assert_close(out[9:11], torch.einsum("nhm,mhd->nhd", maps, values.repeat_interleave(2, 1)))
    assert not out[:9].any() and not out[11:].any()
    (got,) = step.numbers(same).values()
    assert got.is_empty() and got.seconds > 0


def test_softcap_and_window_are_the_layers(order: Any) -> None:
    """Of a request that asks, and of one whose attention is edited, after the softcap."""
    batch = Batch(order, [12, 12], [12, 12])
    values = batch.with_values(order)[1]
    requests = {"asks": asking(12, statistics=BOTH), "edits": asking(12, steer=[edit(keys=[8, 10], weight=3)], statistics=BOTH)}
    step = begun(batch, requests)
    batch.see(step, impl=SimpleNamespace(**{**vars(IMPL), "logits_soft_cap": 1.5, "sliding_window": 5}))

    def capped(logits: Tensor) -> Tensor:
        return (logits / 1.5).tanh() * 1.5

    def more(logits: Tensor) -> Tensor:
        logits = capped(logits)
        logits[..., 8:10] += math.log(3)
        return logits

    got = step.numbers(same)
    maps = batch.maps(0, capped, window=5), batch.maps(1, more, window=5)
    for name, each in zip(requests, maps, strict=True):
        torch.testing.assert_close(got[name].received[0], each.sum(0))
    torch.testing.assert_close(batch.out[12:], torch.einsum("nhm,mhd->nhd", maps[1], values.repeat_interleave(2, 1)))


def test_a_query_without_keys_gives_zeros(order: Any) -> None:
    batch = Batch(order, [5], [5])
    batch.with_values(order)
    step = begun(batch, {"one": asking(5, steer=[edit(keys=[0, 9])])})
    batch.see(step)
    assert not batch.out.any()
    assert not step.numbers(same)["one"].mass.any()


def a_runner(*names: str) -> Any:
    batch = SimpleNamespace(req_ids=[*names], num_computed_tokens_cpu=[0] * len(names))
    config = SimpleNamespace(get_num_attention_heads=lambda parallel: HEADS)
    return SimpleNamespace(input_batch=batch, max_model_len=30, model_config=config, parallel_config=None)


def test_a_worker_forgets_a_request_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_gathered", same)
    extra = {"vlattn": asking(5).ask.written()}
    params = SimpleNamespace(extra_args=extra, max_tokens=3)
    new = SimpleNamespace(req_id="a", sampling_params=params, prompt_len=5)
    plain = SimpleNamespace(req_id="b", sampling_params=SimpleNamespace(extra_args=None), prompt_len=5)
    runner = a_runner("b", "a")
    steps = []

    def execute(*_: Any) -> None:
        steps.append(getattr(worker._NOW, "step", None))

    worker._execute_model(execute, runner, scheduled([new, plain], ["a", "b"]))
    worker._execute_model(execute, runner, scheduled([], ["b"]))
    assert list(runner._vlattn_asking) == ["a"] and steps[0].batch.req_ids == ["b", "a"] and steps[1] is None
    worker._execute_model(execute, runner, scheduled([], ["b"], ["a"]))
    assert not runner._vlattn_asking and steps[2] is None and worker._NOW.step is None


def test_model_runner_v2_makes_its_batch_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an order of its own."""
    monkeypatch.setattr(worker, "_gathered", same)
    params = SimpleNamespace(extra_args={"vlattn": asking(5).ask.written()}, max_tokens=3)
    new = SimpleNamespace(req_id="a", sampling_params=params, prompt_len=5)
    runner = a_runner()
    del runner.input_batch
    places = []

    def execute(runner: Any, *_: Any) -> None:
        made = SimpleNamespace(req_ids=["b", "a"], num_computed_tokens_np=[7, 0])
        assert worker._prepare_inputs(lambda *_: made, runner) is made
        places.append(worker._NOW.step._places["a"])

    worker._execute_model(execute, runner, scheduled([new], ["a", "b"]))
    assert places == [worker.Place("a", 1, 1, 1, 1)] and list(runner.vlattn_numbers) == ["a"]
    out = SimpleNamespace(model_runner_output=SimpleNamespace())
    worker._sample_tokens(lambda *_: out, runner)
    assert list(out.model_runner_output.vlattn_numbers) == ["a"] and not hasattr(out, "vlattn_numbers")


# --- what is refused, and whom it concerns ---

CUT = {"steer": [edit(keys=[0, 4])], "statistics": []}


def test_rows_that_are_not_the_requests_refuse_those_who_ask(order: Any) -> None:
    """Chunks of attention make virtual batches: a second row of the first request looks like the second request."""
    batch = Batch(order, [9, 6], [9, 1])
    batch.with_values(order)
    requests = {"asks": asking(9), "edits": asking(5, **CUT)}
    step = begun(batch, requests)
    batch.see(step)
    assert batch.out.any(1).tolist() == [[False] * 8] * 9 + [[True] * 8], "rows as they are"
    virtual = torch.tensor([0, 4, 9, 10]).int(), torch.tensor([4, 9, 6]).int()
    batch.metadata = SimpleNamespace(
        block_table=batch.table[[0, 0, 1]], query_start_loc=virtual[0], seq_lens=virtual[1], causal=True
    )
    batch.see(step)
    assert not batch.out.any(), "no row is edited"
    got = step.numbers(same)
    for name in requests:
        assert "the rows of model.layers.0.attn are not the requests of the batch" in got[name].refused and got[name].is_empty()


@pytest.mark.parametrize(
    ("starts", "lengths", "right"),
    [
        ([0, 9, 10, 10], [9, 6, 0], True),  # filled up on a GPU
        ([0, 9, 10, 11], [9, 6, 1], False),
        ([0, 9, 10], [9, 5], False),
        ([0, 8, 10], [9, 6], False),
        ([0, 9], [9], False),
    ],
)
def test_rows_are_compared_with_the_batch(order: Any, starts: list[int], lengths: list[int], right: bool) -> None:
    batch = Batch(order, [9, 6], [9, 1])
    vars(batch.metadata).update(query_start_loc=torch.tensor(starts), seq_lens=torch.tensor(lengths))
    step = begun(batch, {"one": asking(9)}, "one", "silent")
    batch.see(step)
    assert bool(step.numbers(same)["one"].refused) != right


def test_a_layer_is_refused_to_those_who_name_it(order: Any) -> None:
    """Layer 1 attends within chunks; the request that asks for layer 0 alone has its numbers."""
    batch = Batch(order, [9, 6], [9, 1])
    step = begun(batch, {"zero": asking(9), "one": asking(5, layers=[1])})
    batch.see(step)
    batch.see(step, 1, attention_chunk_size=4)
    got = step.numbers(same)
    assert got["zero"].mass is not None and not got["zero"].refused
    assert "model.layers.1.attn, which attends within chunks" in got["one"].refused


def test_layers_with_other_heads_or_none_are_refused(order: Any) -> None:
    batch = Batch(order, [9], [9])
    step = begun(batch, {"one": asking(9, layers=[0, 1])})
    step.heads = 2 * HEADS
    batch.see(step)
    assert "model.layers.0.attn has 4 heads, and the model 8" in step.numbers(same)["one"].refused
    for ask in ({"layers": [0, 1]}, {"layers": [0], "steer": [edit(keys=[0, 4], layers=[1])]}):
        step = begun(batch, {"one": asking(9, **ask)})
        batch.see(step)
        assert "layers [1] have no attention" in step.numbers(same)["one"].refused


def test_a_layer_that_attends_twice_is_refused(order: Any) -> None:
    batch = Batch(order, [9], [9])
    step = begun(batch, {"one": asking(9)})
    batch.see(step)
    batch.see(step, name="model.layers.0.cross.attn")
    assert "layer 0 attends twice" in step.numbers(same)["one"].refused


def test_a_fault_refuses_its_request_from_then_on(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(order, [9, 6], [9, 1])
    requests = {"edits": asking(9, **CUT), "asks": asking(5)}
    step = begun(batch, requests)
    with monkeypatch.context() as patched:
        patched.setattr(worker, "edited_attention", lambda *_, **__: 1 / 0)
        batch.see(step)
    got = step.numbers(same)
    assert "ZeroDivisionError: division by zero" in got["edits"].refused and not got["asks"].refused
    step = begun(batch, requests)
    batch.see(step)
    got = step.numbers(same)
    assert "ZeroDivisionError" in got["edits"].refused and not batch.out.any() and got["asks"].mass is not None
    monkeypatch.setattr(worker, "paged_attention_statistics", lambda *_, **__: 1 / 0)
    step = begun(batch, requests)
    batch.see(step)
    assert "ZeroDivisionError" in step.numbers(same)["asks"].refused


def test_ranks_refuse_together(order: Any) -> None:
    """Those that gather different numbers would wait for one another."""
    batch = Batch(order, [9, 6], [9, 1])
    step, shapes = begun(batch, {"one": asking(9), "two": asking(5)}), []

    def gathered(columns: Tensor) -> Tensor:
        shapes.append(columns.shape[1])
        return torch.cat([columns, torch.tensor([[1.0, 0.0]]) if len(shapes) == 1 else columns])

    batch.see(step)
    got = step.numbers(gathered)
    assert "another rank" in got["one"].refused and got["two"].mass.shape == (1, 1, 2 * HEADS, 3) and shapes == [2, 3]


def test_received_of_an_edited_prompt_in_pieces_counts_new_queries(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first seven ran before a preemption; the prompt is cut into pieces of one query."""
    monkeypatch.setattr(steering, "_AT_ONCE", 1)
    batch = Batch(order, [10], [10])
    batch.with_values(order)
    step = begun(batch, {"one": asking(10, counted=7, steer=[edit(keys=[0, 4], heads=[2], weight=2)], statistics=["received"])})
    batch.see(step)

    def more(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, 2, :4] += math.log(2)
        return logits

    got = step.numbers(same)["one"]
    torch.testing.assert_close(got.received[0], batch.maps(0, more)[7:].sum(0))
    assert got.received.abs().sum() > 1 and got.queries == (7, 10)


def test_edits_become_one_bias_of_groups() -> None:
    """Against edits one by one; hundreds of them cost what one does."""
    spans = [[[0, 5]], [[3, 9], [12, None]], [[0, None]], [[7, 8]], [[4, 6]]]
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: int(torch.randint(count, (1,), generator=generator))  # noqa: E731
    edits = [
        {"keys": spans[draw(5)], "queries": spans[draw(5)], "heads": [draw(4)], "layers": [draw(2)], "weight": draw(40) / 8}
        for _ in range(300)
    ]
    steer = check_ask({"steer": edits, "statistics": []}, 2, 4, 10, [], 20).steer
    made = Edits(steer, 20, range(1, 4))
    positions = torch.arange(20)
    for layer in (0, 1):
        bias = made.bias(layer)[:, made.queries][:, :, made.keys]
        assert made.bias(layer).shape[1:].numel() <= 17 * 17 and bias.isneginf().any() and bias.isfinite().any()
        wanted = torch.zeros(3, 20, 20)
        for one in (one for one in steer if layer in one.layers):
            edge = inside(one.queries, positions)[:, None] & inside(one.keys, positions)
            for head in (head for head in one.heads if head > 0):
                wanted[head - 1] += torch.where(edge, math.log(one.weight) if one.weight else -torch.inf, 0.0)
        torch.testing.assert_close(bias, wanted, rtol=1e-5, atol=1e-5)


def test_an_answer_without_end_has_as_many_groups_as_the_model_has_tokens() -> None:
    """max_tokens may be any number in Python."""
    params = SimpleNamespace(extra_args={}, max_tokens=10**11)
    new = SimpleNamespace(req_id="a", sampling_params=params, prompt_len=5)
    one = worker._begun(new, asking(5).ask.written(), a_runner())
    assert not one.refused and one.groups.shape == (30,)
    assert "KeyError" in worker._begun(new, {}, a_runner()).refused


def test_a_rank_has_the_edits_of_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head 5 is the second of the second rank."""
    module = ModuleType("vllm.distributed.parallel_state")
    module.get_tp_group = lambda: SimpleNamespace(rank_in_group=1)  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.distributed"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    new = SimpleNamespace(req_id="a", sampling_params=SimpleNamespace(max_tokens=3), prompt_len=5)
    ask = asking(5, steer=[edit(keys=[0, 4], heads=[5])], statistics=[]).ask
    made = worker._begun(new, ask.written(), a_runner()).edits
    assert made is not None and made.bias(0).isneginf().flatten(1).any(1).tolist() == [False, True, False, False]
