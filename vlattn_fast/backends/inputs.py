"""The inputs of backends: a NamedTuple for each operator, which goes whole to the backend that it names. An operator may define
its own in its streaming backend instead.

`vlattn_fast.ops` derives the operator's schema from the fields (`Schema`). Inputs without an `Attention` have all tensors first.
Code that passes fields by position has them in variables of the fields' names (`tests/test_floors.py`).
B batch, H query heads, Hkv heads of key and value, N queries, M keys, D head_dim, Dv value_dim, T relevancy vectors per sample.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class Attention(NamedTuple):
    """What the logits of an attention call are made of: query (B, H, N, D), key (B, Hkv, M, D), attn_mask broadcastable to
    (B, H, N, M), key_mask bool (B, M). row_bias (B, H, N, G) in the dtype of sums comes with key_groups int64 (B, M), both
    contiguous: row_bias[i, key_groups[j]] is added to the pair (i, j) like a float mask, and nothing for a group outside [0, G).
    score: the kind of a core score (vlattn_fast.scores) with its parameter; vector (H, D) for scores over hidden units."""

    query: Tensor
    key: Tensor
    vector: Tensor | None = None
    attn_mask: Tensor | None = None
    key_mask: Tensor | None = None
    row_bias: Tensor | None = None
    key_groups: Tensor | None = None
    score: str = "dot"
    parameter: float = 0.0
    scale: float = 1.0
    is_causal: bool = False


_TENSORS = Attention._fields.index("score")  # how many of its fields are tensors


class Schema:
    """The inputs of a kind as the arguments of an operator: first the tensors, then the options, each in the order of the fields.
    The fields of an `Attention` stand in its place. `types`: by argument. `inputs` is the inverse of `flat`; `tensors` gives only
    those."""

    def __init__(self, kind: Any) -> None:
        fields = get_type_hints(kind)
        types = dict[str, Any]()
        for field, each in fields.items():
            types |= get_type_hints(Attention) if each is Attention else {field: each}
        first = {name: each for name, each in types.items() if each in (Tensor, Tensor | None)}
        self.types, self.num_tensors = first | types, len(first)
        end, floats = self.num_tensors, [place for place, each in enumerate(self.types.values()) if each is float]
        self.flat: Any = lambda inputs: inputs
        self.tensors: Any = lambda inputs: inputs[:end]
        self.first_float: Any = operator.itemgetter(floats[0]) if floats else None
        self.inputs: Any = kind._make
        if Attention in fields.values():  # by slices, which torch.compile traces
            place = list(fields).index("attention")
            after, rest, own = place + 1, place + _TENSORS, end - _TENSORS + 1
            options = end + len(Attention._fields) - _TENSORS

            def flat(inputs: Any) -> tuple[Any, ...]:
                return tensors(inputs) + inputs.attention[_TENSORS:] + inputs[own:]

            def tensors(inputs: Any) -> tuple[Any, ...]:
                return inputs[:place] + inputs.attention[:_TENSORS] + inputs[after:own]

            def nested(args: tuple[Any, ...]) -> Any:
                attention = Attention(*args[place:rest], *args[end:options])
                return kind(*args[:place], attention, *args[rest:end], *args[options:])

            self.flat, self.tensors, self.inputs = flat, tensors, nested
            self.first_float = operator.attrgetter("attention.parameter")

    def named(self, inputs: Any) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.types, self.flat(inputs), strict=True))

    def from_named(self, named: Mapping[str, Any]) -> Any:
        """The inputs from the arguments by name, which may be more."""
        return self.inputs([named[name] for name in self.types])


schema_of: Callable[[Any], Schema] = functools.cache(Schema)


def named(inputs: Any) -> dict[str, Any]:
    """The arguments of the operator by name."""
    return schema_of(type(inputs)).named(inputs)


def replaced(inputs: Any, **arguments: Any) -> Any:
    """`inputs` with other values for some arguments."""
    return schema_of(type(inputs)).from_named(named(inputs) | arguments)


class ScoreAttentionInputs(NamedTuple):
    """value (B, Hkv, M, Dv), seed () if dropout_p > 0. sink broadcastable to (B, H, N) or None: the public call applies it to
    what backends compute without it; it is here for code that intercepts the operator."""

    attention: Attention
    value: Tensor
    seed: Tensor | None
    sink: Tensor | None
    dropout_p: float
    backend: str


class ScoreAttentionBackwardInputs(NamedTuple):
    """grad_out and out (B, H, N, Dv), grad_lse and lse (B, H, N); the others as in ScoreAttentionInputs."""

    grad_out: Tensor
    grad_lse: Tensor | None
    attention: Attention
    value: Tensor
    out: Tensor
    lse: Tensor
    seed: Tensor | None
    dropout_p: float
    backend: str


class RelevancyAttentionInputs(NamedTuple):
    """Self-attention with value (B, Hkv, N, Dv), carrier (B, T, N), weights broadcastable to (B, N), sink as in
    ScoreAttentionInputs; score "dot" or "dot_softcap"."""

    attention: Attention
    value: Tensor
    carrier: Tensor
    residual_weight: Tensor | None
    attention_weight: Tensor | None
    sink: Tensor | None
    rule: str
    row_normalize: bool
    backend: str

    def without_carrier(self) -> ScoreAttentionInputs:
        """Returns the attention."""
        return ScoreAttentionInputs(self.attention, self.value, seed=None, sink=None, dropout_p=0.0, backend=self.backend)


class RelevancyAttentionBackwardInputs(NamedTuple):
    """grad_out and out (B, H, N, Dv), grad_carrier (B, T, N), grad_lse and lse (B, H, N); the others as in
    RelevancyAttentionInputs. grad_behind_sink: like grad_out, for the public call. need_inputs: whether query, key and value get
    gradients."""

    grad_out: Tensor | None
    grad_carrier: Tensor | None
    grad_lse: Tensor | None
    grad_behind_sink: Tensor | None
    attention: Attention
    value: Tensor
    out: Tensor
    lse: Tensor
    residual_weight: Tensor | None
    attention_weight: Tensor | None
    sink: Tensor | None
    rule: str
    row_normalize: bool
    need_inputs: bool
    backend: str

    def without_carrier(self, grad_out: Tensor) -> ScoreAttentionBackwardInputs:
        """Returns the backward pass of the attention."""
        rows = grad_out, self.grad_lse, self.attention, self.value, self.out, self.lse
        return ScoreAttentionBackwardInputs(*rows, seed=None, dropout_p=0.0, backend=self.backend)

    def step(self, relevancy: Tensor, lse: Tensor | None) -> RelevancyStepInputs:
        """Returns relevancy @ Abar for the same attention."""
        tensors = relevancy, self.attention, self.value, self.grad_out, lse
        return RelevancyStepInputs(*tensors, self.rule, self.row_normalize, self.backend)


class RelevancyStepInputs(NamedTuple):
    """relevancy (B, T, N), value (B, Hkv, M, Dv), grad_output (B, H, N, Dv), lse (B, H, N)."""

    relevancy: Tensor
    attention: Attention
    value: Tensor | None
    grad_output: Tensor | None
    lse: Tensor | None
    rule: str
    row_normalize: bool
    backend: str


class RelevancyStepBackwardInputs(NamedTuple):
    """grad (B, T, M), the gradient of the result; the others as in RelevancyStepInputs. need_*: which gradients are asked for;
    need_inputs stands for query, key, value, grad_output and lse."""

    grad: Tensor
    relevancy: Tensor
    attention: Attention
    value: Tensor | None
    grad_output: Tensor | None
    lse: Tensor | None
    rule: str
    row_normalize: bool
    need_relevancy: bool
    need_inputs: bool
    need_lse: bool
    backend: str


class ResidualWeightsInputs(NamedTuple):
    """residual, branch and grad, the gradient at their sum, (B, N, C) in one dtype; weighting a name of BY_ROWS in the formula's
    file."""

    residual: Tensor
    branch: Tensor
    grad: Tensor
    weighting: str
    backend: str


class AttentionMapInputs(NamedTuple):
    """value (B, Hkv, M, Dv), grad_output (B, H, N, Dv), lse (B, H, N)."""

    attention: Attention
    value: Tensor | None
    grad_output: Tensor | None
    lse: Tensor | None
    rule: str
    head_reduction: str
    row_normalize: bool
    backend: str


class AttentionMapBackwardInputs(NamedTuple):
    """grad (B, N, M), the gradient of the map; the others as in AttentionMapInputs. need_lse: whether lse gets a gradient."""

    grad: Tensor
    attention: Attention
    value: Tensor | None
    grad_output: Tensor | None
    lse: Tensor | None
    rule: str
    head_reduction: str
    row_normalize: bool
    need_lse: bool
    backend: str


class AttentionStatisticsInputs(NamedTuple):
    """row_weight (B, H, N); key_groups may come without a bias, and strided; score as in RelevancyAttentionInputs. statistics:
    the names of the outputs that are needed, with spaces between them."""

    attention: Attention
    row_weight: Tensor | None
    num_groups: int
    statistics: str
    backend: str


class AttentionStatisticsBackwardInputs(NamedTuple):
    """grad_mass and mass (B, H, N, G), grad_entropy, grad_maximum, maximum and argmax (B, H, N), grad_received (B, H, M),
    row_max and mean_x (B, H, N); the others as in AttentionStatisticsInputs."""

    grad_mass: Tensor | None
    grad_entropy: Tensor | None
    grad_maximum: Tensor | None
    grad_received: Tensor | None
    attention: Attention
    mass: Tensor | None
    maximum: Tensor | None
    argmax: Tensor | None
    row_max: Tensor | None
    mean_x: Tensor | None
    row_weight: Tensor | None
    num_groups: int
    statistics: str
    backend: str


class PagedAttentionStatisticsInputs(NamedTuple):
    """T tokens of R requests: query (T, H, D), key_cache (blocks, Hkv, block size, D) of any strides, and integers of 32 or 64
    bits: block_table (R, W), lengths (R), query_starts (R + 1), key_groups (R, K). Keys from K on have no group. window: 0 for
    none."""

    query: Tensor
    key_cache: Tensor
    block_table: Tensor
    lengths: Tensor
    query_starts: Tensor
    key_groups: Tensor | None
    num_groups: int
    statistics: str
    window: int
    score: str
    parameter: float
    scale: float
    backend: str


class CongruenceLossInputs(NamedTuple):
    """queries and keys (B, H, L or V, D) of the blocks LL, VV, LV, VL (see reference.congruence_loss.block_inputs), text_mask
    bool (B, L), image_mask bool (B, V). saves: whether gradients are needed."""

    text_query: Tensor
    image_query: Tensor
    cross_text_query: Tensor
    cross_image_query: Tensor
    text_key: Tensor
    image_key: Tensor
    cross_image_key: Tensor
    cross_text_key: Tensor
    text_mask: Tensor | None
    image_mask: Tensor | None
    kind: str
    normalize: str
    direction: str
    scale: float
    saves: bool
    backend: str


class CongruenceLossBackwardInputs(NamedTuple):
    """grad_loss (B), the gradients from the backend's forward pass; the others as in CongruenceLossInputs."""

    grad_loss: Tensor
    gradients: Tensor
    text_query: Tensor
    image_query: Tensor
    cross_text_query: Tensor
    cross_image_query: Tensor
    text_key: Tensor
    image_key: Tensor
    cross_image_key: Tensor
    cross_text_key: Tensor
    text_mask: Tensor | None
    image_mask: Tensor | None
    kind: str
    normalize: str
    direction: str
    scale: float
    backend: str


def queries_and_keys(x: CongruenceLossInputs | CongruenceLossBackwardInputs) -> tuple[list[Tensor], list[Tensor]]:
    """Returns those of the blocks LL, VV, LV, VL."""
    queries = [x.text_query, x.image_query, x.cross_text_query, x.cross_image_query]
    return queries, [x.text_key, x.image_key, x.cross_image_key, x.cross_text_key]


class StackedCrossAttentionInputs(NamedTuple):
    """images (Bi, R, D + F), captions (Bc, T, D + F), caption_lengths int64 (Bc), image_lengths int64 (Bi). features: F, how
    many of the last columns give the scores by their products; 0: scores are products of the vectors themselves."""

    images: Tensor
    captions: Tensor
    caption_lengths: Tensor | None
    image_lengths: Tensor | None
    features: int
    direction: str
    first_norm: str | None
    smooth: float
    aggregation: str
    lambda_lse: float
    backend: str


class StackedCrossAttentionBackwardInputs(NamedTuple):
    """grad_similarity (Bi, Bc); the others as in StackedCrossAttentionInputs."""

    grad_similarity: Tensor
    images: Tensor
    captions: Tensor
    caption_lengths: Tensor | None
    image_lengths: Tensor | None
    features: int
    direction: str
    first_norm: str | None
    smooth: float
    aggregation: str
    lambda_lse: float
    backend: str


class MaxsimInputs(NamedTuple):
    """queries (A, N, D), documents (B, M, D), query_mask bool (A, N), document_mask bool (B, M). saves: whether the indices of
    the largest products are needed."""

    queries: Tensor
    documents: Tensor
    query_mask: Tensor | None
    document_mask: Tensor | None
    saves: bool
    backend: str


class MaxsimBackwardInputs(NamedTuple):
    """grad_similarity (A, B), places int32 (A, B, N): the document's token with the largest product, -1 for none."""

    grad_similarity: Tensor
    queries: Tensor
    documents: Tensor
    places: Tensor
    backend: str


class GroupRowsInputs(NamedTuple):
    """table (B, H, G, K), groups int64 (B, N)."""

    table: Tensor
    groups: Tensor


class GroupSumsInputs(NamedTuple):
    """rows (B, H, N, K), groups int64 (B, N)."""

    rows: Tensor
    groups: Tensor
    num_groups: int
