"""Add CACR to a training loop: `va.nn.CongruenceLoss` on the attention that `va.nn.capture_attention` hands out.

CACR asks words to attend to each other like the regions that they attend to. The model is a single stream over three words and
four regions. Each region shows one object in one colour, and the words name three of the objects. The task is to tell the colour
of the object that the first word names. The script trains twice from the same weights, without and with CACR, and tests on new
scenes.
"""

import torch
from torch import Tensor, nn

import vlattn_fast as va

OBJECTS, COLOURS, WORDS, REGIONS, WIDTH, HEADS, STEPS = 8, 4, 3, 4, 32, 4, 150


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(OBJECTS, WIDTH), nn.Parameter(0.1 * torch.randn(WORDS, WIDTH))
        self.region = nn.Linear(OBJECTS + COLOURS, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, COLOURS))

    def forward(self, words: Tensor, regions: Tensor) -> Tensor:
        """Logits (B, 4)."""
        x = torch.cat([self.word(words) + self.position, self.region(regions)], dim=1)  # (B, L + V, C)
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L + V, D) each
        x = x + self.out(va.score_attention(query, key, value).transpose(1, 2).flatten(2))
        return self.head(x[:, 0])


def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words (B, 3), regions (B, 4, 12), and the colour of the object that the first word names (B)."""
    objects = torch.rand(size, OBJECTS).argsort(1)[:, :REGIONS]  # no object twice in a scene
    colours = torch.randint(COLOURS, (size, REGIONS))
    features = torch.cat([nn.functional.one_hot(objects, OBJECTS), nn.functional.one_hot(colours, COLOURS)], dim=-1)
    order = torch.rand(size, REGIONS).argsort(1)[:, :WORDS]
    return objects.gather(1, order), features + 0.1 * torch.randn(features.shape), colours.gather(1, order)[:, 0]


def run(model: Model, words: Tensor, regions: Tensor, congruence: va.nn.CongruenceLoss) -> tuple[Tensor, Tensor]:
    """Logits, and the congruence loss of the attention layer: the first WORDS tokens are words."""
    with va.nn.capture_attention(model, modality={"words": "text", "regions": "image"}) as captured:
        logits = model(words, regions)
    return logits, congruence(captured, text_mask=torch.ones_like(words, dtype=torch.bool))


def train(use_cacr: bool) -> tuple[float, float]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    congruence = va.nn.CongruenceLoss("cacr", schedule="linear", num_steps=STEPS)  # the weight grows with time
    for _ in range(STEPS):
        words, regions, colour = batch(64)
        logits, cacr = run(model, words, regions, congruence)
        loss = nn.functional.cross_entropy(logits, colour)
        if use_cacr:
            loss = loss + cacr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    words, regions, colour = batch(1000)
    with torch.no_grad():
        logits, cacr = run(model, words, regions, va.nn.CongruenceLoss("cacr"))
    return (logits.argmax(1) == colour).double().mean().item(), cacr.item()


results = {name: train(use_cacr) for name, use_cacr in (("without CACR", False), ("with CACR", True))}
for name, (accuracy, cacr) in results.items():
    print(f"{name:13} accuracy {accuracy:.1%} (chance: 25%), congruence loss {cacr:.1e} nats")
