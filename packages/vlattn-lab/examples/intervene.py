"""Which attention does an answer need? `va.intervene` cuts it and asks again; one backward pass names the edges to try.

The model answers questions about DigitScenes ("what is left of a six"). Its text tokens attend to the picture in three layers.
The script cuts this attention in each layer by itself, finds the edges that the answers rest on by their first-order effects, and
compares them with the true ones.
"""

from contextlib import nullcontext

import torch

import vlattn_fast as va
import vlattn_lab as lab

model, processor = lab.load_vqa()
asked = lab.digit_questions(24, seed=1)
inputs = processor(asked.images, asked.questions)
TOWER = ("text", "vision")  # tokens of the text attend to those of the picture


def accuracy(edits: list[va.Knockout]) -> float:
    with va.intervene(model, inputs, edits) if edits else nullcontext(), torch.no_grad():
        said = model(**inputs).logits.argmax(-1).tolist()
    return sum(processor.answers[i] == answer for i, answer in zip(said, asked.answers, strict=True)) / len(said)


shares = {"as it is": accuracy([]), "without the picture": accuracy([va.Knockout(keys="image", tower=TOWER)])}
for name, share in shares.items():
    print(f"{name:20} {share:.0%} of {len(asked.answers)} answers are right")

flow = va.information_flow(model, [(inputs, None)], window=1, queries=None, keys="image", tower=TOWER)
for layer, drop in zip(flow.layers, flow.curve.tolist(), strict=True):
    print(f"layer {layer}: the answer's probability falls by {drop:.0%} without the picture")

table = va.attribute_edges(model, inputs, {"words": "text", "picture": "image", "[CLS]": "special"}, tower=TOWER)
true = va.intervene_each(model, inputs, table.top(6), batch_size=6)
print("edges by their first-order effect on the answer's logit, and by what a cut takes from it:")
for first, cut in zip(table.top(6), true, strict=True):
    print(f"  layer {first.layer} head {first.head}, {first.from_} -> {first.to}: {first.effect:+.4f}, {cut.effect:+.4f}")
