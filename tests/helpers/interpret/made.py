"""Explanations made by hand: every value is known."""

import torch

from vlattn_fast.interpret import Explanation


def made(**parts) -> Explanation:
    """Two rows with an image and a text each."""
    values = {
        "relevancy": {"vision": torch.rand(2, 13), "text": torch.rand(2, 6)},
        "image": torch.rand(2, 3, 4),
        "image_samples": [0, 1],
        "text": torch.tensor([[0.1, -0.4, 0.2], [0.3, 0.0, 0.0]]),
        "token_ids": [[7, 8, 9], [5]],
        "scores": torch.tensor([1.5, -2.0]),
        "target": [0, 1],
        "method": "weighted",
        "start_layer": -1,
    }
    return Explanation(**(values | parts))


PROMPTS = [["▁what", "▁is", "▁it", "?"], ["▁who"]]
ANSWERS = [["▁a", "▁gir", "affe"], ["▁me", "</s>"]]


def answered(**parts) -> Explanation:
    """Two answers of a decoder, of three tokens and of two, a row per token. One image of 2 x 3 patches each."""
    patches, prompt, answer = 6, 4, 3
    relevancy = torch.rand(2, answer, 1 + patches + prompt + answer)
    # A word is read at the position before it; the second prompt is padded on the left.
    position = (patches + prompt + torch.arange(answer)).repeat(2, 1)
    relevancy.scatter_(2, position[..., None], 1.25)
    for row in range(answer):
        relevancy[:, row, patches + prompt + row + 1 :] = 0
    words = relevancy.scatter(2, position[..., None], 0.0)[..., 1 + patches :]
    text = torch.zeros(2, answer, prompt + answer)
    text[0] = words[0]
    text[1, :2, :3] = words[1, :2, 3:6]
    ids = [list(range(10, 17)), list(range(20, 23))]
    values = {
        "relevancy": {"language": relevancy},
        "image": relevancy[..., 1 : 1 + patches].reshape(2, answer, 2, 3),
        "image_samples": [0, 1],
        "text": text,
        "token_ids": ids,
        "words": [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)],
        "scores": torch.tensor([[-0.5, -0.25, -0.125], [-1.0, -2.0, 0.0]]),
        "position": {"language": position},
        "answer": [ids[0][4:], ids[1][1:]],
    }
    return Explanation(**(values | parts))
