"""Statistics of a decoder's attention: how much each head looks at the image and how much at the text.

A Llama decoder from transformers reads sixteen image tokens and then eight text tokens, as in a vision-language model. The
script registers an attention function by name, which runs SDPA and also calls `va.attention_statistics`; neither stores a map.
The weights are random, so the shares mean nothing here. Load trained weights to find heads with a task.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import vlattn_fast as va

IMAGE, TEXT = 16, 8
groups = torch.tensor([0] * IMAGE + [1] * TEXT)  # the group of each key: 0 = image, 1 = text
statistics: list[va.AttentionStatistics] = []


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    """query (B, H, N, D) after the rotary embedding; key (B, Hkv, N, D) with fewer heads (grouped-query attention)."""
    masks = {"is_causal": True} if attention_mask is None else {"attn_mask": attention_mask}
    statistics.append(
        va.attention_statistics(query, key, key_groups=groups, num_groups=2, scale=options["scaling"], enable_gqa=True, **masks)
    )
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register("sdpa_with_statistics", attention)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    initializer_range=0.15,  # so that random heads differ
)
model = LlamaModel(config).eval()
model.set_attn_implementation("sdpa_with_statistics")
embeddings = torch.cat([torch.randn(1, IMAGE, 64), model.embed_tokens(torch.arange(TEXT)[None])], dim=1)
with torch.no_grad():
    model(inputs_embeds=embeddings, use_cache=False)

print("attention of the last text token: share on the image, head by head; entropy in nats")
for layer, (mass, entropy, *_) in enumerate(statistics):
    image_share = mass[0, :, -1, 0]  # (H)
    shares = " ".join(f"{share:.2f}" for share in image_share.tolist())
    print(f"  layer {layer}: image {shares} | mean entropy {entropy[0, :, -1].mean():.2f}")
received = torch.stack([layer.received[0].mean(0) for layer in statistics]).mean(0)  # (N), over layers and heads
print(f"  most attention is received by token {int(received.argmax())} (causal attention favours early tokens)")
