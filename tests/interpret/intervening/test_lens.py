"""`lens` next to the model's last norm and head, applied to the states after each layer."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.interpret.edited_maps import llama, made


class Words:
    """A tokenizer of numbers: the id of a word is its number and `more`."""

    def __init__(self, more: int = 0) -> None:
        self.more = more

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) + self.more for word in text.split()]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{token}" for token in ids]


def expected(family: str, model: Any, inputs: dict[str, Any]) -> Tensor:
    """Probabilities (L, B, N, V) of hidden states: those after layers 0 and 1, and the normed ones after the last layer."""
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        norm = model.model.language_model.norm if family == "llava" else model.model.norm
        states = [norm(state) for state in outputs.hidden_states[1:-1]] + [outputs.hidden_states[-1]]
        return torch.stack([model.lm_head(state).float().softmax(-1) for state in states])


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_states_are_read_by_the_last_norm_and_the_head(family: str) -> None:
    model, inputs = llama() if family == "llama" else made("llava")
    whole = expected(family, model, inputs)
    seen = va.lens(model, inputs, tokens=["7", 9], k=3, processor=Words())
    assert seen.layers == (0, 1, 2) and seen.tokens == {"7": 7, "9": 9}
    torch.testing.assert_close(seen.probabilities, whole[..., [7, 9]], rtol=0, atol=1e-6)
    torch.testing.assert_close(seen.probability, whole.topk(3, -1).values, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.gather(-1, seen.top), seen.probability, rtol=0, atol=1e-6)
    last = va.lens(model, inputs, layers=-1)
    assert last.layers == (2,) and torch.equal(last.top[0, ..., :3], seen.top[2])
    assert "w" in repr(seen)


def test_a_token_has_a_map_of_each_image() -> None:
    model, inputs = made("llava")
    seen = va.lens(model, inputs, tokens=[7])
    is_image = inputs["input_ids"] == 55
    assert torch.equal(seen.positions, is_image)
    for number, image in enumerate(seen.maps("7")):
        assert torch.equal(image.flatten(1), seen.probabilities[:, number, is_image[number], 0])
    frame = seen.to_pandas()
    assert len(frame) == 3 * int(is_image.sum()) and list(frame.columns[-2:]) == ["probability", "7"]
    assert len([axes for axes in seen.plot("7", number=1).axes if axes.images]) == 3


def test_what_a_lens_cannot_read_is_named() -> None:
    model, inputs = llama()
    for call, error, message in [
        (lambda: va.lens(model, inputs, tokens=["7"]), ValueError, "processor must have a tokenizer"),
        (lambda: va.lens(model, inputs, tokens=["7 8"], processor=Words()), ValueError, "tokens must be words of one token each"),
        (lambda: va.lens(model, inputs, tokens=[1.0]), TypeError, "tokens must be ids or words; got float"),
        (lambda: va.lens(model, inputs, tokens="7"), TypeError, "tokens must be a list of ids or words; got str"),
        (lambda: va.lens(model, inputs, tokens=7), TypeError, "tokens must be a list of ids or words; got int"),
        (lambda: va.lens(model, inputs, tokens=[-1]), ValueError, "tokens must be at least 0; got -1"),
        (lambda: va.lens(model, inputs, tokens=[7, 60]), ValueError, r"tokens must be ids below 60, .*; got \[7, 60\]"),
        (
            lambda: va.lens(model, inputs, [70, "70"], processor=Words(1)),
            ValueError,
            "tokens must have names that differ; got '70'",
        ),
        (lambda: va.lens(model, inputs, k=0), ValueError, "k must be"),
        (lambda: va.lens(model, inputs, layers=5), ValueError, "layers must be from -3 to 2"),
        (lambda: va.lens(model, inputs).maps("7"), ValueError, "token must be one of tokens="),
        (lambda: va.lens(model, inputs, [7]).maps("7"), ValueError, "inputs must have an image whose tokens are patches"),
    ]:
        with pytest.raises(error, match=message):
            call()
    vit, images = made("vit")
    with pytest.raises(ValueError, match="model must give logits for each of the"):
        va.lens(vit, images)
