"""The inputs of backends: a NamedTuple for each operator, which goes whole to the backend that it names. An operator may define
its own in its streaming backend instead.

The fields are in the order of the operator's schema, which `vlattn_fast.ops` derives from them. All tensors come first. Code that
passes fields by position has them in variables of the fields' names (`tests/test_floors.py`).
B batch, H query heads, Hkv heads of key and value, N queries, M keys, D head_dim, Dv value_dim, T relevancy vectors per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


def derivative_inputs(
    backward_inputs: type[Any], differentiable: Sequence[str], *, grads: Sequence[str], one_sweep: bool = False
) -> tuple[Any, Any]:
    """Returns the inputs of an operator's jvp and of its second derivative, two NamedTuples. Both begin with the tangents
    `<field>_tangent` of the `differentiable` fields, None for zeros. Then come the fields of the backward operator: for the jvp
    without `grads`, those of its outputs. A second derivative in one sweep also takes the tangents of `grads`, and `with_jvp`."""
    stem, types = backward_inputs.__name__.removesuffix("BackwardInputs"), get_type_hints(backward_inputs)
    tangents: list[tuple[str, Any]] = [(f"{field}_tangent", Tensor | None) for field in differentiable]
    of_grads: list[tuple[str, Any]] = [(f"{field}_tangent", Tensor | None) for field in grads] if one_sweep else []
    fields = [(field, kind) for field, kind in types.items() if not field.startswith("need_")]
    jvp = NamedTuple(f"{stem}JvpInputs", [*tangents, *[each for each in fields if each[0] not in grads]])  # type: ignore[misc]
    return jvp, NamedTuple(f"{stem}SecondInputs", [*tangents, *of_grads, *fields, *[("with_jvp", bool)] * one_sweep])


class ScoreAttentionInputs(NamedTuple):
    """query (B, H, N, D), key (B, Hkv, M, D), value (B, Hkv, M, Dv), vector (H, D) or None, attn_mask broadcastable to
    (B, H, N, M), key_mask bool (B, M), seed () if dropout_p > 0. row_bias (B, H, N, G) in the dtype of sums and key_groups
    int64 (B, M), both contiguous, come together: row_bias[i, key_groups[j]] is added to the pair (i, j) like a float mask, and
    nothing for a group outside [0, G). sink broadcastable to (B, H, N) or None: the public call
    applies it to what backends compute without it; it is here for code that intercepts the operator."""

    query: Tensor
    key: Tensor
    value: Tensor
    vector: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    row_bias: Tensor | None
    key_groups: Tensor | None
    seed: Tensor | None
    sink: Tensor | None
    score: str
    parameter: float
    scale: float
    dropout_p: float
    is_causal: bool
    backend: str


class ScoreAttentionBackwardInputs(NamedTuple):
    """grad_out and out (B, H, N, Dv), grad_lse and lse (B, H, N); the others as in ScoreAttentionInputs."""

    grad_out: Tensor
    grad_lse: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    vector: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    row_bias: Tensor | None
    key_groups: Tensor | None
    seed: Tensor | None
    score: str
    parameter: float
    scale: float
    dropout_p: float
    is_causal: bool
    backend: str


ScoreAttentionJvpInputs, ScoreAttentionSecondInputs = derivative_inputs(
    ScoreAttentionBackwardInputs, ("query", "key", "value", "vector", "row_bias"), grads=("grad_out", "grad_lse"), one_sweep=True
)


class RelevancyAttentionInputs(NamedTuple):
    """query (B, H, N, D), key (B, Hkv, N, D), value (B, Hkv, N, Dv), carrier (B, T, N), weights broadcastable to (B, N); masks,
    sink and score ("dot" or "dot_softcap") as in ScoreAttentionInputs."""

    query: Tensor
    key: Tensor
    value: Tensor
    carrier: Tensor
    residual_weight: Tensor | None
    attention_weight: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    row_bias: Tensor | None
    key_groups: Tensor | None
    sink: Tensor | None
    rule: str
    row_normalize: bool
    score: str
    parameter: float
    scale: float
    is_causal: bool
    backend: str


class RelevancyAttentionBackwardInputs(NamedTuple):
    """grad_out and out (B, H, N, Dv), grad_carrier (B, T, N), grad_lse and lse (B, H, N); the others as in
    RelevancyAttentionInputs. grad_behind_sink: like grad_out, for the public call. need_inputs: whether query, key and value get
    gradients."""

    grad_out: Tensor | None
    grad_carrier: Tensor | None
    grad_lse: Tensor | None
    grad_behind_sink: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    residual_weight: Tensor | None
    attention_weight: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    row_bias: Tensor | None
    key_groups: Tensor | None
    sink: Tensor | None
    rule: str
    row_normalize: bool
    score: str
    parameter: float
    scale: float
    is_causal: bool
    need_inputs: bool
    backend: str

    def attention(self, grad_out: Tensor) -> ScoreAttentionBackwardInputs:
        """Returns the backward pass of the attention without its carrier."""
        query, key, value, out, lse = self.query, self.key, self.value, self.out, self.lse
        masks = self.attn_mask, self.key_mask, self.row_bias, self.key_groups
        tensors = grad_out, self.grad_lse, query, key, value, out, lse, None, *masks, None
        return ScoreAttentionBackwardInputs(
            *tensors, self.score, self.parameter, self.scale, dropout_p=0.0, is_causal=self.is_causal, backend=self.backend
        )

    def step(self, relevancy: Tensor, lse: Tensor | None) -> RelevancyStepInputs:
        """Returns relevancy @ Abar for the same attention."""
        tensors = relevancy, self.query, self.key, self.value, self.grad_out, lse
        masks = self.attn_mask, self.key_mask, self.row_bias, self.key_groups
        score = self.score, self.parameter, self.scale
        return RelevancyStepInputs(*tensors, *masks, self.rule, self.row_normalize, *score, self.is_causal, self.backend)


class RelevancyStepInputs(NamedTuple):
    """relevancy (B, T, N), query (B, H, N, D), key (B, Hkv, M, D), value (B, Hkv, M, Dv), grad_output (B, H, N, Dv), lse
    (B, H, N), masks as in ScoreAttentionInputs."""

    relevancy: Tensor
    query: Tensor
    key: Tensor
    value: Tensor | None
    grad_output: Tensor | None
    lse: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    row_bias: Tensor | None
    key_groups: Tensor | None
    rule: str
    row_normalize: bool
    score: str
    parameter: float
    scale: float
    is_causal: bool
    backend: str


class RelevancyStepBackwardInputs(NamedTuple):
    """grad (B, T, M), the gradient of the result; the others as in RelevancyStepInputs. need_*: which gradients are asked for;
    need_inputs stands for query, key, value, grad_output and lse."""

    grad: Tensor
    relevancy: Tensor
    query: Tensor
    key: Tensor
    value: Tensor | None
    grad_output: Tensor | None
    lse: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    row_bias: Tensor | None
    key_groups: Tensor | None
    rule: str
    row_normalize: bool
    score: str
    parameter: float
    scale: float
    is_causal: bool
    need_relevancy: bool
    need_inputs: bool
    need_lse: bool
    backend: str


RelevancyStepJvpInputs, RelevancyStepSecondInputs = derivative_inputs(
    RelevancyStepBackwardInputs, ("relevancy", "query", "key", "value", "grad_output", "lse", "row_bias"), grads=("grad",)
)


def attention_of(x: Any) -> ScoreAttentionInputs:
    """Returns the attention of these inputs without a carrier, relevancy or rule; without a value the query replaces it."""
    value = x.query if x.value is None else x.value
    tensors = x.query, x.key, value, None, x.attn_mask, x.key_mask, x.row_bias, x.key_groups, None, None
    return ScoreAttentionInputs(*tensors, x.score, x.parameter, x.scale, dropout_p=0.0, is_causal=x.is_causal, backend=x.backend)


class ResidualWeightsInputs(NamedTuple):
    """residual, branch and grad, the gradient at their sum, (B, N, C) in one dtype; weighting a name of BY_ROWS in the formula's
    file."""

    residual: Tensor
    branch: Tensor
    grad: Tensor
    weighting: str
    backend: str


class AttentionMapInputs(NamedTuple):
    """query (B, H, N, D), key (B, Hkv, M, D), value (B, Hkv, M, Dv), grad_output (B, H, N, Dv), lse (B, H, N), masks as in
    ScoreAttentionInputs."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    grad_output: Tensor | None
    lse: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    row_bias: Tensor | None
    key_groups: Tensor | None
    rule: str
    head_reduction: str
    row_normalize: bool
    score: str
    parameter: float
    scale: float
    is_causal: bool
    backend: str


class AttentionMapBackwardInputs(NamedTuple):
    """grad (B, N, M), the gradient of the map; the others as in AttentionMapInputs. need_lse: whether lse gets a gradient."""

    grad: Tensor
    query: Tensor
    key: Tensor
    value: Tensor | None
    grad_output: Tensor | None
    lse: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    row_bias: Tensor | None
    key_groups: Tensor | None
    rule: str
    head_reduction: str
    row_normalize: bool
    score: str
    parameter: float
    scale: float
    is_causal: bool
    need_lse: bool
    backend: str


AttentionMapJvpInputs, AttentionMapSecondInputs = derivative_inputs(
    AttentionMapBackwardInputs, ("query", "key", "value", "grad_output", "lse", "row_bias"), grads=("grad",)
)


class AttentionStatisticsInputs(NamedTuple):
    """query (B, H, N, D), key (B, Hkv, M, D), key_groups (B, M), row_weight (B, H, N), masks as in ScoreAttentionInputs, score as
    in RelevancyAttentionInputs. statistics: the names of the outputs that are needed, with spaces between them."""

    query: Tensor
    key: Tensor
    key_groups: Tensor | None
    row_weight: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    row_bias: Tensor | None
    num_groups: int
    statistics: str
    score: str
    parameter: float
    scale: float
    is_causal: bool
    backend: str


class AttentionStatisticsBackwardInputs(NamedTuple):
    """grad_mass and mass (B, H, N, G), grad_entropy, grad_maximum, maximum and argmax (B, H, N), grad_received (B, H, M),
    row_max and mean_x (B, H, N); the others as in AttentionStatisticsInputs."""

    grad_mass: Tensor | None
    grad_entropy: Tensor | None
    grad_maximum: Tensor | None
    grad_received: Tensor | None
    query: Tensor
    key: Tensor
    mass: Tensor | None
    maximum: Tensor | None
    argmax: Tensor | None
    row_max: Tensor | None
    mean_x: Tensor | None
    key_groups: Tensor | None
    row_weight: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    row_bias: Tensor | None
    num_groups: int
    statistics: str
    score: str
    parameter: float
    scale: float
    is_causal: bool
    backend: str


AttentionStatisticsJvpInputs, AttentionStatisticsSecondInputs = derivative_inputs(
    AttentionStatisticsBackwardInputs,
    ("query", "key", "row_weight", "row_bias"),
    grads=("grad_mass", "grad_entropy", "grad_maximum", "grad_received"),
)


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
    direction: str
    scale: float
    saves: bool
    backend: str

    @property
    def queries(self) -> list[Tensor]:
        return [self.text_query, self.image_query, self.cross_text_query, self.cross_image_query]

    @property
    def keys(self) -> list[Tensor]:
        return [self.text_key, self.image_key, self.cross_image_key, self.cross_text_key]


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
    direction: str
    scale: float
    backend: str

    @property
    def queries(self) -> list[Tensor]:
        return [self.text_query, self.image_query, self.cross_text_query, self.cross_image_query]

    @property
    def keys(self) -> list[Tensor]:
        return [self.text_key, self.image_key, self.cross_image_key, self.cross_text_key]


CongruenceLossJvpInputs, CongruenceLossSecondInputs = derivative_inputs(
    CongruenceLossBackwardInputs, CongruenceLossInputs._fields[:8], grads=("grad_loss",)
)


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


StackedCrossAttentionJvpInputs, StackedCrossAttentionSecondInputs = derivative_inputs(
    StackedCrossAttentionBackwardInputs, ("images", "captions"), grads=("grad_similarity",)
)


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


MaxsimJvpInputs, MaxsimSecondInputs = derivative_inputs(
    MaxsimBackwardInputs, ("queries", "documents"), grads=("grad_similarity",)
)


class GroupRowsInputs(NamedTuple):
    """table (B, H, G, K), groups int64 (B, N)."""

    table: Tensor
    groups: Tensor


class GroupSumsInputs(NamedTuple):
    """rows (B, H, N, K), groups int64 (B, N)."""

    rows: Tensor
    groups: Tensor
    num_groups: int
