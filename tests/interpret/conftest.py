"""The fixtures that build a small random model of the family a test names."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.helpers.interpret.cases import CASES, Case, lively
from tests.helpers.interpret.decoder_cases import DECODERS, Decoder, mllama


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """The case named by the test's parameter, its model in eval mode."""
    torch.manual_seed(0)
    made = CASES[request.param]()
    lively(made.model).eval()
    return made


@pytest.fixture
def decoder(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(6)
    made = {**DECODERS, "mllama": mllama}[request.param]()
    lively(made.model).eval()
    return made
