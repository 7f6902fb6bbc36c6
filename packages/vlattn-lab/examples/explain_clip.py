"""Explain a Hugging Face model: which patches of a picture, and which words, make the two similar.

Part 1 runs a small CLIP with random weights on a real photo, without any download. For maps with a meaning, load
`CLIPModel.from_pretrained(...)` and let its processor make the inputs. The calls stay the same.
Part 2 explains a trained model: the UNITER of this package, on scenes of handwritten digits. The script counts how often the most
relevant region is one of the two digits that the caption names.
"""

import torch
from sklearn.datasets import load_sample_image
from transformers import CLIPConfig, CLIPModel

import vlattn_fast as va
import vlattn_lab as lab

# Part 1: CLIP, one photo, two texts.
torch.manual_seed(0)
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
config = CLIPConfig(
    text_config={**small, "vocab_size": 1000, "bos_token_id": 998, "eos_token_id": 999},
    vision_config={**small, "image_size": 128, "patch_size": 16},
    projection_dim=64,
)
model = CLIPModel(config).eval()

photo = torch.tensor(load_sample_image("china.jpg"))[:, 107:534]  # (427, 427, 3), the square in the middle
pixels = torch.nn.functional.interpolate(photo.permute(2, 0, 1)[None].float() / 255, size=(128, 128), mode="area")
inputs = {
    "pixel_values": (pixels - 0.45) / 0.27,  # (1, 3, 128, 128)
    "input_ids": torch.tensor([[998, 11, 12, 13, 999], [998, 21, 22, 23, 999]]),  # two texts of three words each
}
clip = va.explain(model, inputs, method="gradient")

print("CLIP, random weights, china.jpg")
print(f"  similarity of the photo with each text: {[round(score, 3) for score in clip.scores.tolist()]}")
print(f"  relevancy of the patches {tuple(clip.image.shape)}, of the words {tuple(clip.text.shape)}")
row, column = divmod(int(clip.image[0].argmax()), clip.image.shape[2])
print(f"  most relevant patch for the first text: row {row}, column {column}")

# Part 2: a trained model.
uniter, processor = lab.load_uniter()
scenes = lab.digit_scenes(100, seed=1)
digits = va.explain(uniter, scenes.inputs(), target=lambda outputs: outputs.logits[:, 1] - outputs.logits[:, 0])
top = digits.regions.argmax(1, keepdim=True)  # (100, 1)
pointing = scenes.named.gather(1, top).double().mean().item()

print("UNITER, trained on DigitScenes, four digits a scene")
print(f"  first caption: {scenes.captions[0]!r}")
for digit, relevancy, named in zip(scenes.digits[0], digits.regions[0], scenes.named[0], strict=True):
    print(f"    digit {digit}: relevancy {relevancy:.4f}{'  named' if named else ''}")
print(f"  the most relevant region is a named digit in {pointing:.0%} of 100 scenes (chance: 50%)")
