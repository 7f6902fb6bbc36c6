"""A method in a file of its own is all that `explain` and `evaluate` need: CONTRIBUTING's example among the other methods."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from vlattn_fast.interpret import evaluate, explain
from vlattn_fast.interpret.relevancy import methods
from vlattn_fast.interpret.relevancy.methods import registry
from vlattn_fast.interpret.relevancy.methods.registry import with_options

CONTRIBUTING = Path(__file__).parents[3] / "CONTRIBUTING.md"
NAME = "layer_mean"


def example():
    """CONTRIBUTING's method."""
    section = CONTRIBUTING.read_text(encoding="utf-8").split("## Add a method")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    return code


def add_file(folder, monkeypatch, code):
    """Put `code` into a file beside those of the methods."""
    (folder / f"{NAME}.py").write_text(code)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.setitem(sys.modules, f"{methods.__name__}.{NAME}", None)  # takes the module out when the test ends
    monkeypatch.delitem(sys.modules, f"{methods.__name__}.{NAME}")
    monkeypatch.setattr(methods, NAME, None, raising=False)


@pytest.fixture
def added(tmp_path, monkeypatch):
    add_file(tmp_path, monkeypatch, example())
    found = registry.methods_in_folder()
    assert set(found) - {*registry.METHODS, *registry.ABLATIONS} == {NAME}
    monkeypatch.setitem(registry.METHODS, NAME, found[NAME])


def layer_means(maps, score):
    """The mean over layers and heads (B, N, M) of relu(A * dA), from stored maps (B, H, N, M)."""
    grads = torch.autograd.grad(score.sum(), maps, retain_graph=True)
    return torch.stack([(a * g).relu().mean(1) for a, g in zip(maps, grads, strict=True)]).mean(0).detach()


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_towers_by_themselves(case, added):
    got = explain(case.model, case.inputs, method=NAME)
    assert got.method == NAME and got.image.shape == (3, 4, 4)
    case.model.set_attn_implementation("eager")
    outputs = case.model(**case.inputs, output_attentions=True)
    for name, of_tower in (("vision", outputs.vision_model_output), ("text", outputs.text_model_output)):
        maps = layer_means(of_tower.attentions, outputs.logits_per_image.diagonal())
        want = maps[torch.arange(3), got.position[name]]
        torch.testing.assert_close(got.relevancy[name], want, rtol=1e-4, atol=1e-6)
        assert want.max() > 1e-4
    table = evaluate(case.model, [(case.inputs, None, None)], methods=("gradient", NAME), tests=("deletion",)).table
    assert {row["method"] for row in table} == {"gradient", NAME}


def test_towers_that_attend_to_one_another(added):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 60}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    inputs = {"input_ids": torch.randint(5, 50, (2, 9)), "decoder_input_ids": torch.randint(5, 50, (2, 4))}
    score = lambda outputs: outputs.logits[:, -1, 7]  # noqa: E731
    got = explain(model, inputs, method=NAME, position="last", target=score).relevancy
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_attentions=True)
    of_decoder, of_encoder = (
        layer_means(maps, score(outputs))[:, -1] for maps in (outputs.decoder_attentions, outputs.cross_attentions)
    )
    of_decoder[:, -1] = 0.0  # the token that is read
    torch.testing.assert_close(got, {"tower1": of_decoder, "tower0": of_encoder}, rtol=1e-4, atol=1e-6)
    assert of_encoder.max() > 1e-4 and of_decoder.max() > 1e-4


FOUND_EVERYWHERE = """
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    def find_spec(name, path=None, target=None):  # the methods lie in one more folder
        if name == "vlattn_fast.interpret.relevancy.methods":
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            spec.submodule_search_locations.append(sys.argv[1])
            return spec

sys.meta_path.insert(0, Finder)
import torch, transformers
import vlattn_fast as va
from vlattn_fast import cli
from typer.main import get_command

config = transformers.ViTConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
model, inputs = transformers.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(1, 3, 16, 16)}
print(va.explain.__doc__)
for command in ("explain", "evaluate"):
    print(command, *[option.help for option in get_command(cli.app).commands[command].params if option.name == "method"])
print(va.explain(model, inputs, method="layer_mean"))
print(va.evaluate(model, [(inputs, None, None)], methods=("layer_mean",), tests=("deletion",)).table)
try:
    va.explain(model, inputs, method="none")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_one_file_is_all(tmp_path):
    """The docstring of `explain`, both commands, `explain`, `evaluate`, and the error for an unknown name have the method."""
    (tmp_path / f"{NAME}.py").write_text(example())
    command = [sys.executable, "-c", FOUND_EVERYWHERE, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f'- "{NAME}": The mean over the layers of the row of mean_h relu(A * dA).\n' in run.stdout
    for begin in ("explain .*", "evaluate .*", "Explanation\\(method='", "\\[\\{'method': '", "method must be one of .*"):
        assert re.search(f"^{begin}{NAME}", run.stdout, re.M), f"{begin}\n{run.stdout}"


@pytest.mark.parametrize("case", ["siglip"], indirect=True)
def test_what_a_method_does_not_define_is_refused(case, tmp_path, monkeypatch):
    """A class with a name alone."""
    base = "from vlattn_fast.interpret.relevancy.method import Method\n"
    add_file(tmp_path, monkeypatch, f'{base}class Nothing(Method):\n    name = "{NAME}"\n')
    monkeypatch.setitem(registry.METHODS, NAME, registry.methods_in_folder()[NAME])
    with pytest.raises(ValueError, match=f"method='{NAME}' does not support towers that do not attend"):
        explain(case.model, case.inputs, method=NAME)
    with pytest.raises(ValueError, match=f"weighting must be an option of method '{NAME}', which has freeze, of; got 'norm'"):
        with_options(NAME, weighting="norm")


def test_two_methods_with_one_name(tmp_path, monkeypatch):
    base = "from vlattn_fast.interpret.relevancy.method import Method\n"
    add_file(tmp_path, monkeypatch, f'{base}class Again(Method):\n    name = "gradient"\n')
    with pytest.raises(ValueError, match=f"each method must have a name of its own; got 'gradient' in .*{NAME}"):
        registry.methods_in_folder()
