"""A batch in a worker, without vLLM: what a layer hands over, and what leaves."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlattn_fast import paged_attention_statistics
from vlattn_vllm import blocks, steering, worker
from vlattn_vllm.ask import check_ask, groups_of_tokens
from vlattn_vllm.worker import Asking, Step, layer_number, refusal, window

SIZE, HEADS, KEY_HEADS, HEAD_DIM = 4, 4, 2, 8
IMPL = SimpleNamespace(scale=0.5, logits_soft_cap=0, sliding_window=-1)


def transposed(key: Tensor, isa: str) -> Tensor:
    return key[:, 0].T.flatten()


def tiles(key: Tensor, isa: str) -> Tensor:
    """Pairs of features of one token lie side by side, as tiles of matrix units want them."""
    return key[:, 0].unflatten(1, (-1, 2)).transpose(0, 1).flatten()


@pytest.fixture(params=[transposed, tiles])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(blocks, "_written", request.param)
    monkeypatch.setattr(blocks, "_values_written", request.param)
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
                        block.view(-1)[SIZE * HEAD_DIM :] = order(part[:, head : head + 1], "")
        return values

    def see(self, step: Step, number: int = 0, impl: Any = IMPL) -> None:
        layer = SimpleNamespace(layer_name=f"model.layers.{number}.attn", isa="any")
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


def asking(prompt: int, counted: int = 0, **ask: Any) -> Asking:
    checked = check_ask(
        {**({} if ask.get("statistics") == [] else {"layers": [0]}), **ask}, 2, 2 * HEADS, prompt, [], prompt + 20
    )
    return Asking(checked, prompt, groups_of_tokens(checked, prompt + 20), counted)


def ids(*names: str) -> Any:
    return SimpleNamespace(req_ids=[*names])


BOTH = ["mass", "received"]


def test_a_batch_has_the_numbers_of_its_maps(order: Any) -> None:
    """A whole prompt, the middle of one, a token of an answer that does not ask, and one that does, of one layer."""
    batch = Batch(order, [9, 6, 11, 10], [9, 4, 1, 1])
    spans = {"groups": {"a": [[0, 3]], "b": [[4, None]]}}
    requests = {
        "whole": asking(9, statistics=BOTH, **spans),
        "middle": asking(8, statistics=["mass"], **spans),
        "token": asking(7, layers=[1, 0], statistics=["entropy", "maximum"]),
    }
    step = Step(requests, ids("whole", "middle", "silent", "token"))
    batch.see(step)
    batch.query = -batch.query
    batch.see(step, 1)
    ones = batch.maps(3)[0]
    batch.query = -batch.query
    got = step.numbers(lambda columns: columns)
    assert set(got) == {"whole", "token"}, "no token is chosen in the middle of a prompt"
    maps = batch.maps(0)
    mass = torch.stack([maps[-1, :, :3].sum(-1), maps[-1, :, 4:].sum(-1)], -1)
    torch.testing.assert_close(got["whole"].mass, mass[None, None])
    torch.testing.assert_close(got["whole"].received, maps.sum(0)[None])
    assert got["whole"].queries == (0, 9) and got["whole"].entropy is None and got["token"].received is None
    token = torch.stack([ones, batch.maps(3)[0]])
    torch.testing.assert_close(got["token"].entropy, -token.xlogy(token).sum(-1)[None])
    torch.testing.assert_close(got["token"].maximum, token.amax(-1)[None])


def test_queries_that_ran_before_count_once(order: Any) -> None:
    """A preempted request of 10 tokens, whose first 7 queries are in `received`, runs again; then once more as far as token 5."""
    batch = Batch(order, [10], [10])
    one = asking(6, counted=7, statistics=BOTH)
    step = Step({"one": one}, ids("one"))
    batch.see(step)
    got = step.numbers(lambda columns: columns)["one"]
    torch.testing.assert_close(got.received, batch.maps(0)[7:, :, :6].sum(0)[None])
    assert got.queries == (7, 10) and one.counted == 10
    batch = Batch(order, [8], [8])
    step = Step({"one": one}, ids("one"))
    batch.see(step)
    got = step.numbers(lambda columns: columns)["one"]
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
    step = Step(requests, ids(*requests))
    batch.see(step)
    got = step.numbers(lambda columns: columns)
    ends = {"one": [(0, 3)], "three": [(0, 2), (2, 3), (3, 6)], "short": [(0, 5)]}
    for number, (name, spans) in enumerate(ends.items()):
        mass = torch.stack([batch.maps(number)[-1, :, start:end].sum(-1) for start, end in spans], -1)
        torch.testing.assert_close(got[name].mass, mass[None, None])


def test_layers_of_gpus_hand_over_keys_in_front_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Triton kernel, which a GPU takes, in Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(worker, "paged_attention_statistics", partial(paged_attention_statistics, backend="triton"))
    batch = OnGpu([9, 6], [9, 1])
    step = Step({"one": asking(9, statistics=BOTH), "two": asking(5, statistics=["maximum"])}, ids("one", "two"))
    batch.see(step)
    got = step.numbers(lambda columns: columns)
    maps = batch.maps(0)
    torch.testing.assert_close(got["one"].received, maps.sum(0)[None])
    torch.testing.assert_close(got["two"].maximum[0, 0], batch.maps(1)[0].amax(-1))
    assert [window(SimpleNamespace(sliding_window=kept)) for kept in (-1, 16, (-1, -1), (15, 0))] == [None, 16, None, 16]


def test_ranks_have_parts_of_the_heads(order: Any) -> None:
    batch = Batch(order, [9], [9])
    step = Step({"one": asking(9, statistics=BOTH)}, ids("one"))
    batch.see(step)
    got = step.numbers(lambda columns: torch.cat([columns, columns + 1]))["one"]
    assert got.mass.shape == (1, 1, 2 * HEADS, 3) and got.received.shape == (1, 2 * HEADS, 9)
    torch.testing.assert_close(got.received[:, HEADS:], got.received[:, :HEADS] + 1)


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
    step = Step({"one": asking(9)}, ids("one"))
    batch.see(step, impl=SimpleNamespace(**{**vars(IMPL), **impl}))
    got = step.numbers(lambda columns: columns)["one"]
    assert words in got.refused and got.mass is None


def test_another_backend_is_refused_by_name() -> None:
    assert "must be one of CPU_ATTN, FLASH_ATTN, TRITON_ATTN; got SimpleNamespace" in refusal(
        SimpleNamespace(), SimpleNamespace()
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
    spans = {"groups": {"a": [[0, 3]], "b": [[4, None]]}, "statistics": ["mass", "entropy", "maximum", "received"]}
    cut = edit(keys=[1, 3], queries=[[4, 6], [7, None]]), edit(keys="answer", heads=[1, 5], weight=3.0)
    requests = {
        "prompt": asking(8, steer=cut, **spans),
        "token": asking(7, steer=[edit(keys=[0, 4], heads=[5])], statistics=["mass"]),
        "plain": asking(7, statistics=["mass"]),
    }
    step = Step(requests, ids("prompt", "token", "plain"), rank)
    batch.see(step)
    got = step.numbers(lambda columns: columns)

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
    torch.testing.assert_close(got["prompt"].received[0], maps[0].sum(0)[:, :8])
    torch.testing.assert_close(got["token"].mass[0, 0, :, 1], maps[1][0, :, :7].sum(-1))
    torch.testing.assert_close(got["plain"].mass[0, 0, :, 1], batch.maps(2)[-1, :, :7].sum(-1))


def test_an_edit_in_a_window_reads_no_block_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. Blocks before the window belong to other requests by then; here they are not numbers."""
    batch = OnGpu([9, 15], [9, 2])
    values = batch.with_values(None)[1]
    batch.cache[batch.table[1, :2].long()] = torch.nan
    step = Step({"one": asking(9, steer=[edit(keys=[11, 12])], statistics=[])}, ids("plain", "one"))
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
    (got,) = step.numbers(lambda columns: columns).values()
    assert got.is_empty() and got.seconds > 0


def test_a_query_without_keys_gives_zeros(order: Any) -> None:
    batch = Batch(order, [5], [5])
    batch.with_values(order)
    step = Step({"one": asking(5, steer=[edit(keys=[0, 9])])}, ids("one"))
    batch.see(step)
    assert not batch.out.any()
    assert not step.numbers(lambda columns: columns)["one"].mass.any()


def test_a_worker_forgets_a_request_that_ended() -> None:
    extra = {"vlattn": asking(5).ask.written()}
    params = SimpleNamespace(extra_args=extra, max_tokens=3)
    new = SimpleNamespace(req_id="a", sampling_params=params, prompt_len=5)
    plain = SimpleNamespace(req_id="b", sampling_params=SimpleNamespace(extra_args=None), prompt_len=5)
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["b", "a"]))
    steps = []

    def execute(*_: Any) -> None:
        steps.append(getattr(worker._NOW, "step", None))

    worker._execute_model(execute, runner, scheduled([new, plain], ["a", "b"]))
    worker._execute_model(execute, runner, scheduled([], ["b"]))
    assert list(runner._vlattn_asking) == ["a"] and steps[0].batch.req_ids == ["b", "a"] and steps[1] is None
    worker._execute_model(execute, runner, scheduled([], ["b"], ["a"]))
    assert not runner._vlattn_asking and steps[2] is None and worker._NOW.step is None
