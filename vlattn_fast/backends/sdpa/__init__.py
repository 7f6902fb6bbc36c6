"""PyTorch's own scaled_dot_product_attention, for what it takes: no log-sum-exp, no dropout, no attn_mask."""
