"""Train on relevancy: `va.nn.RelevancyLoss` on the rows that `va.nn.capture_relevancy` gives with their gradient.

A picture has 16 patches. One shows an object of one of four kinds, which is the answer. Another has a shade that goes with the
answer in training, and with nothing in the test. The script trains a small transformer twice from the same weights: with the
cross-entropy alone, and with the share of relevancy outside of the object added to it. Masks are known for one picture in four.
"""

import torch
from torch import Tensor, nn

import vlattn_fast as va

KINDS, PATCHES, WIDTH, HEADS, STEPS, BATCH, MASKED = 4, 16, 32, 4, 200, 32, 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Linear(2 * KINDS, WIDTH), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, KINDS))

    def forward(self, patches: Tensor) -> Tensor:
        """Logits (B, 4)."""
        x = torch.cat([self.cls.expand(len(patches), -1, -1), self.embed(patches)], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


def batch(size: int, cue: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (B, 16, 8), the kind of the object (B), and a mask of its patch (B, 4, 4). `cue`: the shade tells the kind."""
    kind = torch.randint(KINDS, (size,))
    shade = kind if cue else torch.randint(KINDS, (size,))
    places = torch.rand(size, PATCHES).argsort(1)
    patches, rows = 0.3 * torch.randn(size, PATCHES, 2 * KINDS), torch.arange(size)
    patches[rows, places[:, 0], kind] += 1.5
    patches[rows, places[:, 1], KINDS + shade] += 3.0
    return patches, kind, nn.functional.one_hot(places[:, 0], PATCHES).bool().unflatten(1, (4, 4))


def step(model: Model, weight: float) -> Tensor:
    patches, kind, mask = batch(BATCH, cue=True)
    if not weight:
        return nn.functional.cross_entropy(model(patches), kind)
    with va.nn.capture_relevancy(model) as captured:
        logits = model(patches[:MASKED])
    score = logits.gather(1, kind[:MASKED, None]).sum()
    outside = va.nn.RelevancyLoss("inside", prefix=1)(captured.relevancy(score, position="cls"), mask[:MASKED])
    logits = torch.cat([logits, model(patches[MASKED:])])
    return nn.functional.cross_entropy(logits, kind) + weight * outside


def train(weight: float) -> tuple[float, float]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        step(model, weight).backward()
        optimizer.step()
    patches, kind, mask = batch(1000, cue=False)
    with torch.no_grad():
        accuracy = (model(patches).argmax(1) == kind).float().mean().item()
    explanation = va.explain(
        model, {"patches": patches}, position="cls", target=lambda logits: logits.gather(1, kind[:, None])[:, 0]
    )
    outside = va.nn.RelevancyLoss("inside", prefix=1)(explanation.relevancy["tower0"], mask)
    return accuracy, 1 - outside.item()


plain, plain_inside = train(0.0)
guided, guided_inside = train(2.0)
print(f"cross-entropy alone:     {plain:.0%} right where the shade tells nothing, {plain_inside:.0%} of relevancy on the object")
print(
    f"and loss on relevancy:   {guided:.0%} right where the shade tells nothing, {guided_inside:.0%} of relevancy on the object"
)
