"""Put another score function into a model that is trained already: `va.nn.replace_attention`.

A small ViT of transformers learns handwritten digits. Then the last layer gets a Hadamard score with new parameters, and the
model learns on for a while. At the end the model gets its first attention back.
"""

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import vlattn_fast as va
import vlattn_lab as lab

STEPS = 120
torch.manual_seed(0)
config = ViTConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=8, patch_size=2, num_channels=1
)
config.num_labels = 10
model = ViTForImageClassification(config)
scans, digits, _ = lab.digit_scans("train")
new_scans, new_digits, _ = lab.digit_scans("test")


def train(steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        chosen = torch.randint(len(scans), (64,))
        loss = nn.functional.cross_entropy(model.train()(pixel_values=scans[chosen, None]).logits, digits[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def logits() -> Tensor:
    return model.eval()(pixel_values=new_scans[:, None]).logits


def accuracy() -> float:
    return (logits().argmax(1) == new_digits).double().mean().item()


train(STEPS)
before, logits_before = accuracy(), logits()
with va.nn.replace_attention(model, score="hadamard", layers=-1, per_head=True) as replaced:
    untrained, change = accuracy(), (logits() - logits_before).abs().max().item()
    train(STEPS // 2)
    trained = accuracy()
    explanation = va.explain(model, {"pixel_values": new_scans[:1, None]})  # explain takes the model like any other
print(f"replaced: {', '.join(replaced.scores)}")
print(f"accuracy on new scans: {before:.1%} with its own score, {untrained:.1%} with a new one, {trained:.1%} after training it")
print(f"the new one moves logits by up to {change:.1f} before it is trained")
print(f"relevancy of the patches {tuple(explanation.image.shape)}; back to its own attention: {accuracy():.1%}")
