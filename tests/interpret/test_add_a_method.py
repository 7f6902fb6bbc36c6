"""A method in a file of its own is all that `explain` and `evaluate` need: CONTRIBUTING's example among the other methods."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from vlattn_fast.interpret import evaluate, explain  # noqa: E402
from vlattn_fast.interpret.relevancy import methods  # noqa: E402
from vlattn_fast.interpret.relevancy.methods import registry  # noqa: E402

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
NAME = "value_gradient"


def add_file(folder, monkeypatch, code):
    """Put `code` into a file beside those of the methods."""
    (folder / f"{NAME}.py").write_text(code)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.setitem(sys.modules, f"{methods.__name__}.{NAME}", None)  # takes the module out when the test ends
    monkeypatch.delitem(sys.modules, f"{methods.__name__}.{NAME}")
    monkeypatch.setattr(methods, NAME, None, raising=False)


@pytest.fixture
def added(tmp_path, monkeypatch):
    section = CONTRIBUTING.read_text(encoding="utf-8").split("## Add a method")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    add_file(tmp_path, monkeypatch, code)
    found = registry.methods_in_folder()
    assert set(found) - {*registry.METHODS, *registry.ABLATIONS} == {NAME}
    monkeypatch.setitem(registry.METHODS, NAME, found[NAME])


def value_gradients(model, projections, run):
    """The outputs (B, N, C) of the projections times their gradients, (B, N) each."""
    values = []
    handles = [projection.register_forward_hook(lambda m, a, output: values.append(output)) for projection in projections]
    score = run()
    for handle in handles:
        handle.remove()
    return [(v * g).sum(-1).detach() for v, g in zip(values, torch.autograd.grad(score.sum(), values), strict=True)]


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_towers_by_themselves(case, added):
    text, vision = (tower.encoder.layers[-1].self_attn.v_proj for tower in (case.model.text_model, case.model.vision_model))
    run = lambda: case.model(**case.inputs).logits_per_image.diagonal()  # noqa: E731
    of_vision, of_text = value_gradients(case.model, [vision, text], run)
    got = explain(case.model, case.inputs, method=NAME)
    assert got.method == NAME and got.image.shape == (3, 4, 4)
    torch.testing.assert_close(got.relevancy, {"vision": of_vision, "text": of_text}, rtol=1e-4, atol=1e-5)
    assert of_vision.abs().max() > 1e-3 and of_text.abs().max() > 1e-3
    table = evaluate(case.model, [(case.inputs, None, None)], methods=("gradient", NAME), tests=("deletion",)).table
    assert {row["method"] for row in table} == {"gradient", NAME}


def test_towers_that_attend_to_one_another(added):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 60}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    inputs = {"input_ids": torch.randint(5, 50, (2, 9)), "decoder_input_ids": torch.randint(5, 50, (2, 4))}
    score = lambda outputs: outputs.logits[:, -1, 7]  # noqa: E731
    projections = [part.block[-1].layer[0].SelfAttention.v for part in (model.encoder, model.decoder)]
    of_encoder, of_decoder = value_gradients(model, projections, lambda: score(model(**inputs)))
    got = explain(model, inputs, method=NAME, read="last", target=score).relevancy
    torch.testing.assert_close(got, {"tower1": of_decoder, "tower0": of_encoder}, rtol=1e-4, atol=1e-6)
    assert of_encoder.abs().max() > 1e-4 and of_decoder.abs().max() > 1e-4


INTEGRATED = """
import torch

from vlattn_fast.interpret.relevancy.method import Method

STEPS = 24


class Integrated(Method):
    name = "value_gradient"
    share, target = 1.0, None

    def carry(self, backward):
        (tower,) = backward.towers

        def scaled(module, args):
            self.inputs = (args[0].detach() * self.share).requires_grad_()
            return (self.inputs, *args[1:])

        with tower.model.get_submodule(f"{tower.lists[0]}.0").register_forward_pre_hook(scaled):
            whole = tower.model(**backward.arguments).logits
            chosen = whole.argmax(-1) if self.target is None else torch.tensor(self.target)
            inputs, row = self.inputs.detach(), 0
            for step in range(STEPS):
                self.share = 0.5 + (step + 0.5) / STEPS / 2
                score = tower.model(**backward.arguments).logits.gather(1, chosen[:, None])
                (grad,) = torch.autograd.grad(score.sum(), self.inputs)
                row = row + (inputs * grad).sum(-1) / STEPS / 2
        return [row[:, None]]
"""


@pytest.mark.parametrize("target", [None, [2, 0, 3]])
@pytest.mark.parametrize("case", ["bert"], indirect=True)
def test_a_method_that_runs_the_model_again(case, target, tmp_path, monkeypatch):
    """Integrated gradients add up to the difference of the score from that of half the input; the class is that of all of it."""
    add_file(tmp_path, monkeypatch, INTEGRATED)
    monkeypatch.setitem(registry.METHODS, NAME, registry.methods_in_folder()[NAME])
    monkeypatch.setattr(registry.METHODS[NAME], "target", target)
    half = lambda module, args: (args[0] / 2, *args[1:])  # noqa: E731
    first, model = case.model.bert.encoder.layer[0], case.model

    def at_half():
        with first.register_forward_pre_hook(half), torch.no_grad():
            return model(**case.inputs).logits

    with torch.no_grad():  # the largest class of the first text is another one at half the input
        whole = model(**case.inputs).logits[0]
        gained = (whole - at_half()[0]).argmax()
        model.classifier.bias.sub_(whole)[gained] += 0.01
    assert at_half()[0].argmax() != gained
    got = explain(model, case.inputs, method=NAME, target=target)
    assert got.target == target or got.target[0] == gained
    base = at_half().gather(1, torch.tensor(got.target)[:, None])[:, 0]
    gain = got.scores - base
    assert gain.abs().max() > 0.1
    torch.testing.assert_close(got.relevancy["text"].sum(-1), gain, rtol=0.01, atol=0.002)


@pytest.mark.parametrize("case", ["siglip"], indirect=True)
def test_what_a_method_does_not_define_is_refused(case, tmp_path, monkeypatch):
    """A class with a name alone."""
    base = "from vlattn_fast.interpret.relevancy.method import Method\n"
    add_file(tmp_path, monkeypatch, f'{base}class Nothing(Method):\n    name = "{NAME}"\n')
    monkeypatch.setitem(registry.METHODS, NAME, registry.methods_in_folder()[NAME])
    with pytest.raises(ValueError, match=f"method='{NAME}' has no rule for towers that do not attend"):
        explain(case.model, case.inputs, method=NAME)
    with pytest.raises(ValueError, match=f"weighting must be left out .*; got 'norm' for '{NAME}'"):
        explain(case.model, case.inputs, method=NAME, weighting="norm")


def test_two_methods_with_one_name(tmp_path, monkeypatch):
    base = "from vlattn_fast.interpret.relevancy.method import Method\n"
    add_file(tmp_path, monkeypatch, f'{base}class Again(Method):\n    name = "gradient"\n')
    with pytest.raises(ValueError, match=f"methods must have names of their own; got 'gradient' in .*{NAME}"):
        registry.methods_in_folder()
