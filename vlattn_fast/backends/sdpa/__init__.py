"""PyTorch's own scaled_dot_product_attention, for what it takes: no log-sum-exp, no dropout, no attn_mask.

In: the checked arguments of score_attention.
Out: its output.
Imports: _ground.
"""
