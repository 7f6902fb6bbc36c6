"""What stands around a call changes nothing: torch.compile, pipelines, PEFT's wrapper."""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import TEXT, lively
from tests.interpret.properties.test_traces import assert_same, marked, state_of
from vlattn_fast.interpret import explain
from vlattn_fast.models import UNITER, UNITERConfig
from vlattn_fast.nn import capture_attention, capture_relevancy

MODEL = UNITER(UNITERConfig(99, 32, 2, 4, 64, region_dim=8)).eval()
INPUTS = {
    "input_ids": torch.arange(1, 11).view(2, 5),
    "region_features": torch.randn(2, 3, 8),
    "region_positions": torch.randn(2, 3, 7),
}


def explained(x: Tensor) -> Any:
    return va.explain(MODEL, INPUTS).relevancy["joint"] * (x + 1)


def evaluated(x: Tensor) -> Any:
    found = va.evaluate(MODEL, [(INPUTS, None, None)], tests=("positive", "insertion"), steps=(0.0, 0.5, 1.0))
    return [row["value"] for row in found.table], x + 1


def probed(x: Tensor) -> Any:
    return [row["value"] for row in va.probe(MODEL, [(INPUTS, None)], tests=("modality",)).table], x + 1


def captured(x: Tensor) -> Any:
    with capture_attention(MODEL) as seen:
        MODEL(**INPUTS)
    query, key = seen.query, seen.key
    return query * (x + 1), torch.autograd.grad((query @ key.mT).square().sum(), MODEL.uniter.embeddings.word_embeddings.weight)


def traced(x: Tensor) -> Any:
    with capture_relevancy(MODEL) as seen:
        logits = MODEL(**INPUTS).logits
    row = seen.relevancy(logits[:, 1].sum())
    return row * (x + 1), torch.autograd.grad(row.square().sum(), MODEL.uniter.embeddings.word_embeddings.weight)


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """What Dynamo has made graphs of."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a call that fails. tests/interpret/properties/test_traces.py has the other functions."""
    for function in (evaluated, probed):
        model = copy.deepcopy(MODEL)
        monkeypatch.setitem(globals(), "MODEL", marked(model))
        before = state_of(model)
        function(torch.zeros(()))
        assert_same(model, before, function.__name__)
        with model.register_forward_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
            function(torch.zeros(()))
        assert_same(model, before, f"{function.__name__}, which fails")


@pytest.mark.parametrize("function", [explained, evaluated, probed, captured, traced])
def test_the_same_as_elsewhere(function: Callable[[Tensor], Any], graphs: list[torch.fx.GraphModule]) -> None:
    """explain and evaluate failed within Dynamo."""

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    x = torch.zeros(())
    torch.testing.assert_close(torch.compile(function, backend=keep)(x), function(x))
    attends = [node for graph in graphs for node in graph.graph.nodes if "attention" in str(node.target)]
    assert not attends, "Dynamo traced the model"
    assert len(graphs) <= 2, "Dynamo traced what looks into the model"


@pytest.fixture
def bert():
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return lively(model).eval(), {"input_ids": torch.randint(5, 50, (2, 7)), "attention_mask": mask}


def same(got, want):
    torch.testing.assert_close(got.relevancy["text"], want.relevancy["text"], rtol=1e-5, atol=1e-6)
    assert got.target == want.target


def test_pipeline(bert):
    from tokenizers import Tokenizer, models, pre_tokenizers

    model, inputs = bert
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    same(explain(pipeline, inputs), explain(model, inputs))


def test_peft(bert):
    """PEFT puts its layers into the model and keeps that as its base model; prompts it would prepend itself."""
    model, inputs = bert

    class Wrapped(nn.Module):
        def __init__(self, prompts: bool) -> None:
            super().__init__()
            self.inner, self.peft_config = model, {}
            self.active_peft_config = SimpleNamespace(is_prompt_learning=prompts, peft_type="PREFIX_TUNING")

        def get_base_model(self) -> nn.Module:
            return self.inner

    same(explain(Wrapped(False), inputs), explain(model, inputs))
    with pytest.raises(ValueError, match="model must take its prompts as inputs; got PEFT's PREFIX_TUNING"):
        explain(Wrapped(True), inputs)
