"""The curve of an answer's probability by layer, beside single knockouts."""

from dataclasses import replace

import pytest
import torch
import transformers

import vlattn_fast as va
from tests.helpers.interpret import encoder_cases
from tests.helpers.interpret.edited_maps import llama, made


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_curve_is_made_of_knockouts_in_windows(batch_size: int) -> None:
    model, inputs = made("llava")
    curve = va.information_flow(model, [(inputs, None)], window=2, batch_size=batch_size)
    rows, last = [0, 1], [23, 21]
    with torch.no_grad():
        logits = model(**inputs).logits[rows, last]
        target = logits.argmax(-1)
        torch.testing.assert_close(curve.base, logits.softmax(-1)[rows, target], rtol=1e-9, atol=0)
        for layer, window in enumerate([(0, 1), (1, 2), (2,)]):
            with va.intervene(model, inputs, va.Knockout(queries="last", keys="image", layers=window)):
                cut = model(**inputs).logits[rows, last].softmax(-1)[rows, target]
            torch.testing.assert_close(curve.probability[:, layer], cut, rtol=1e-9, atol=0)
    torch.testing.assert_close(curve.change, curve.probability / curve.base[:, None] - 1)
    torch.testing.assert_close(curve.curve, -curve.change.mean(0))
    assert curve.label == "image -> last" and curve.window == 2


def test_answers_and_single_samples_are_joined() -> None:
    model, inputs = made("llava")
    answer = [[5, 6], [7, 8, 9]]
    both = va.information_flow(model, [(inputs, answer)], window=1, heads=[0, 2])
    single = [({name: value[row : row + 1] for name, value in inputs.items()}, [answer[row]]) for row in range(2)]
    joined = va.information_flow(model, single, window=1, heads=[0, 2])
    assert both.probability.shape == (2, 3)
    torch.testing.assert_close(both.probability, joined.probability, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        both.base, va.explain(model, inputs, answer=answer, per_token=False).scores.exp(), rtol=1e-9, atol=0
    )
    frame = both.to_pandas()
    assert list(frame.columns) == ["sample", "layer", "probability", "base", "change"] and len(frame) == 6
    assert frame["probability"].tolist() == both.probability.flatten().tolist()
    axes = both.plot().axes[0]
    assert axes.get_lines()[0].get_ydata() == pytest.approx((100 * both.change.mean(0)).tolist())
    assert axes.get_lines()[0].get_xdata().tolist() == [0, 1, 2]
    two = replace(both, probability=both.probability[:, 1:], layers=(4, 5)).plot().axes[0]
    assert two.get_lines()[0].get_xdata().tolist() == [4, 5] and all(tick == round(tick) for tick in two.get_xticks())


def test_an_answer_behind_patches() -> None:
    """GIT's logits start with those of its patches."""
    case, answer = encoder_cases.git(), [[5, 6], [7, 8]]
    model, inputs = case.model.eval(), case.inputs
    flow = va.information_flow(model, [(inputs, answer)], window=1)
    explained = va.explain(model, inputs, answer=answer, per_token=False)
    torch.testing.assert_close(flow.base, explained.scores.exp(), check_dtype=False)


def test_a_window_is_a_quarter_of_the_layers() -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=9, vocab_size=9
    )
    model, inputs = transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    default, two = (va.information_flow(model, [(inputs, None)], keys=(0, 2), **how) for how in ({}, {"window": 2}))
    assert default.window == 2 and torch.equal(default.probability, two.probability)


def test_a_probability_that_is_nan_is_refused() -> None:
    model, inputs = llama()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"target must give scores that are numbers; got nan for samples \[0, 1\]"):
        va.information_flow(model, [(inputs, [[3], [4]])], window=1, keys=(0, 2))
    with pytest.raises(ValueError, match=r"target must give scores that are numbers; got nan for samples \[0, 1\]"):
        va.information_flow(model, [(inputs, None)], window=1, keys=(0, 2))


def test_bad_data_is_refused_by_name() -> None:
    model, inputs = llama()
    for dataset, message in (
        ([], "dataset must have at least one item"),
        ([inputs], "dataset must yield"),
        (3, "dataset must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            va.information_flow(model, dataset, window=1, keys=(0, 2))
    with pytest.raises(ValueError, match="window must be"):
        va.information_flow(model, [(inputs, None)], window=0)
    clip, pairs = made("clip")
    with pytest.raises(ValueError, match="model must predict tokens or classes"):
        va.information_flow(clip, [(pairs, None)], window=1, queries="special")
