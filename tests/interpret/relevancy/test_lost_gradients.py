"""Modules in which a gradient ends, as quantised ones: named in a warning, or refused where nothing gets by."""

import re
import warnings

import pytest
import torch
from torch import nn

from tests.helpers.interpret.cases import lively, vit
from vlattn_fast.interpret import explain


class Quantised(nn.Module):
    """A linear module without a gradient, as those of eight bits are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.register_buffer("weight", inner.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() @ self.weight.T


def quantised(chosen: str, make=Quantised):
    case = vit()
    for name, module in list(case.model.named_modules()):
        if isinstance(module, nn.Linear) and chosen in name:
            parent, _, leaf = name.rpartition(".")
            setattr(case.model.get_submodule(parent), leaf, make(module))
    return lively(case.model), case.inputs


def dynamic(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will leave it to torchao
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {nn.Linear}, dtype=torch.qint8)[0]


@pytest.mark.parametrize("make", [Quantised, dynamic])
def test_a_map_that_lacks_a_part_is_warned_about(make) -> None:
    model, inputs = quantised("layers.1.mlp.fc2", make)
    kind = "Quantised" if make is Quantised else "Linear"
    words = rf"relevancy leaves out what goes through 'vit\.layers\.1\.mlp\.fc2' \({kind}\), whose output has no gradient"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        explanation = explain(model, inputs)
    (ours,) = [one for one in said if "relevancy leaves out" in str(one.message)]
    assert explanation.image is not None
    assert re.search(words, str(ours.message))
    for method in ("rollout", "attention"):  # take no gradient
        explain(model, inputs, method=method)  # a warning is an error


def test_each_module_is_named() -> None:
    model, inputs = quantised("mlp")
    with pytest.warns(
        UserWarning, match=r"'vit\.layers\.0\.mlp\.fc1' .*, 'vit\.layers\.2\.mlp\.fc1' \(Quantised\), whose output"
    ):
        explain(model, inputs)


@pytest.mark.parametrize("make", [Quantised, dynamic])
@pytest.mark.parametrize("chosen", ["classifier", ""])
def test_a_path_that_is_cut_is_refused_with_its_cause(chosen, make) -> None:
    model, inputs = quantised(chosen, make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            ValueError,
            match=r": gradients end in '.*(\)| more modules), whose output has no gradient. Explain the model before you",
        ):
            explain(model, inputs)


def test_what_has_its_gradient_is_not_warned_about() -> None:
    case = vit()
    explain(case.model, case.inputs)
