"""What the dimensions of tensors are, by the names that arguments have in all operators.

b = samples, h = heads (of queries or of keys), q = queries, k = keys, other letters = what nothing divides. Leading ones may be
absent. ":k" behind them: the numbers are places of keys.
"""

from __future__ import annotations

DIMENSIONS = {
    "query": "bhqd",
    "key": "bhkd",
    "value": "bhkd",
    "grad_output": "bhqd",
    "lse": "bhq",
    "attn_mask": "bhqk",
    "key_mask": "bk",
    "sink": "bh",
    "query_groups": "bq",
    "key_groups": "bk",
    "group_bias": "bhij",
    "head_gate": "bh",
    "relevancy": "btq",
    "carrier": "btq",
    "residual_weight": "bq",
    "attention_weight": "bq",
    "row_weight": "bq",
    "queries": "bq",
    "other_query": "bhqd",
    "other_key": "bhkd",
    "teacher_lse": "bhq",
    "index_query": "bhqd",
    "index_key": "bkd",
    "index_weights": "bhq",
    "topk_indices": "bqn:k",
    **dict.fromkeys(("text_query", "text_key", "cross_text_query", "cross_text_key"), "bhqd"),
    **dict.fromkeys(("image_query", "image_key", "cross_image_query", "cross_image_key"), "bhkd"),
    "text_mask": "bq",
    "image_mask": "bk",
    "log_decay": "bhq",
    "beta": "bhq",
    "diagonal": "bhq",
    **dict.fromkeys(("residual", "branch", "residual_carrier", "branch_carrier"), "bqc"),
}
