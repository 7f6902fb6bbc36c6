"""One observer: what sees a foreign model, and how much code one call passes."""

import ast
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlattn_fast as va

PACKAGE = Path(va.__file__).parent
WATCHING = [PACKAGE / name for name in ("attach", "interpret", "nn", "train")]


def test_one_mode_of_torch_sees_a_model() -> None:
    texts = {path: path.read_text() for folder in WATCHING for path in sorted(folder.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items() if "TorchFunctionMode" in text}
    kinds = [(path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    modes = [(path, node.name) for path, node in kinds if any(ast.unparse(base) == "TorchFunctionMode" for base in node.bases)]
    assert modes == [(PACKAGE / "attach" / "observer.py", "Observer")]


def llava() -> tuple[Any, dict[str, torch.Tensor]]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = CLIPVisionConfig(**sizes, image_size=28, patch_size=14), LlamaConfig(**sizes, vocab_size=100)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=99, vision_feature_layer=-1)
    ids = torch.tensor([[1, *[99] * 4, 5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}
    return LlavaForConditionalGeneration(config).eval(), inputs


def test_explain_passes_few_files_in_few_calls() -> None:
    """A call of `explain` on a LLaVA, after one that imports and plans."""
    model, inputs = llava()
    va.explain(model, inputs)
    files: Counter[str] = Counter()  # calls of Python functions

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            files[frame.f_code.co_filename] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        va.explain(model, inputs)
    finally:
        sys.setprofile(before)
    assert len(files) <= 44, "\n".join(sorted(files))
    assert files.total() <= 8000, files.most_common(12)


@pytest.mark.parametrize("name", ["on_enter", "on_leave", "on_attention", "on_result"])
def test_a_model_is_restored_after_an_error_of_a_subscriber(name: str) -> None:
    from vlattn_fast.attach.events import RUNNING, Subscriber
    from vlattn_fast.attach.observer import Observer

    class Fails(Subscriber):
        pass

    def fail(*args: Any) -> None:
        if args[-1] is not None:  # else a module has failed, and the error goes on
            raise RuntimeError("a fault of the subscriber")

    setattr(Fails, name, fail)
    model, inputs = llava()
    expected = model(**inputs).logits
    before = {module: (dict(vars(module)), len(module._forward_hooks)) for module in model.modules()}
    with pytest.raises(RuntimeError, match="a fault of the subscriber"), Observer(model, [Fails()], parts=[model]):
        model(**inputs)
    for module, (attributes, hooks) in before.items():
        assert vars(module).keys() == attributes.keys() and len(module._forward_hooks) == hooks
        assert all(vars(module)[key] is value for key, value in attributes.items() if key != "training")
    assert RUNNING.get() is None and torch.overrides._get_current_function_mode_stack() == []
    assert torch.equal(model(**inputs).logits, expected)


def test_events_are_equal_however_a_model_attends() -> None:
    """SDPA, transformers' interface, nn.MultiheadAttention and attention that is written out by hand give the same event."""
    from vlattn_fast.attach.events import Attend, AttentionEvent, Subscriber
    from vlattn_fast.attach.observer import Observer

    class Written(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            scores = torch.matmul(query, key.transpose(-1, -2)) * 0.5
            return torch.matmul(torch.softmax(scores, -1), value)

    class Called(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5)

    class Scored(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return va.score_attention(query, key, value, score="dot", scale=0.5)

    class Notes(Subscriber):
        def __init__(self) -> None:
            self.events: list[AttentionEvent] = []

        def on_attention(self, event: AttentionEvent, attend: Attend) -> Any:
            self.events.append(event)
            return attend(event)

    tensors = [torch.randn(2, 3, 5, 4) for _ in range(3)]
    for module in (Written(), Called(), Scored()):
        notes = Notes()
        with Observer(module, [notes], starts=[module]):
            output = module(*tensors)
        (event,) = notes.events
        assert torch.equal(event.query, tensors[0]) and torch.equal(event.key, tensors[1])
        assert event.masks is not None and event.masks["scale"] == 0.5 and not event.masks["is_causal"]
        torch.testing.assert_close(output, Called()(*tensors))
        replaced = Notes()
        with Observer(module, [replaced], parts=[module]):
            torch.testing.assert_close(module(*tensors), output)


def interrupted(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Ctrl-C in the second layer, after which torch runs no hooks."""

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    layer = model.model.language_model.layers[1].mlp
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layer, "forward", stop)
        model(**inputs)


def test_a_pass_after_an_interrupted_one_is_as_the_first() -> None:
    """Of a capture, and of an edit."""
    model, _ = llava()
    ids = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    with va.nn.capture_attention(model, layers=[0, 1]) as expected:
        model(**ids)
    with va.nn.capture_attention(model, layers=[0, 1]) as captured:
        interrupted(model, ids)
        model(**ids)
    assert len(captured) == len(expected) == 2 and torch.equal(captured[1].text[0], expected[1].text[0])
    with va.intervene(model, ids, va.Knockout(queries="last", keys=(0, 1))):
        edited = model(**ids).logits
        interrupted(model, ids)
        assert torch.equal(model(**ids).logits, edited)
    assert not torch.equal(model(**ids).logits, edited)


def test_attention_that_no_edit_concerns_stays_as_it_is() -> None:
    """Where `intervene` edits nothing, any shape is allowed, and what began to see the model outside still sees it."""
    model, inputs = llava()
    with va.nn.capture_attention(model, layers=[0, 1]) as expected:
        model(**inputs)
    blocks = torch.randn(2, 3, 4, 5, 6)
    product = torch.nn.functional.scaled_dot_product_attention(blocks, blocks, blocks)
    with va.nn.capture_attention(model, layers=[0, 1]) as captured:
        with va.intervene(model, inputs, va.Knockout(queries="last", keys=(0, 1))):
            model(**inputs)
            assert torch.equal(torch.nn.functional.scaled_dot_product_attention(blocks, blocks, blocks), product)
    assert torch.equal(captured[1].image[0], expected[1].image[0])


def test_a_call_of_tensors_with_different_dimensions_is_left_alone() -> None:
    """torch's function broadcasts them."""

    class Pools(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            query = torch.nn.functional.one_hot(input_ids, 16).float()[:, None].expand(-1, 2, -1, -1)
            tokens = torch.nn.functional.scaled_dot_product_attention(query, query, query)
            learned = torch.ones(2, 7, 16)
            return torch.nn.functional.scaled_dot_product_attention(tokens, learned, learned)

    model, ids = Pools(), torch.tensor([[1, 2, 3]])
    with va.nn.capture_attention(model) as captured:
        assert torch.equal(model(input_ids=ids), Pools()(ids))
    assert captured.text[0].shape == (1, 2, 3, 16)


def test_a_hook_runs_the_edited_model_in_the_middle_of_its_attention() -> None:
    model, _ = llava()
    ids, other = {"input_ids": torch.tensor([[1, 5, 6, 7]])}, {"input_ids": torch.tensor([[1, 7, 6, 5]])}
    for run in (lambda: va.explain(model, ids).scores, lambda: model(**other).logits):
        ran: list[Any] = []

        def hook(*_: Any, run: Any = run, ran: list[Any] = ran) -> None:
            if not ran:
                ran.append(None)
                ran.append(run())

        with va.intervene(model, ids, va.Knockout(queries="last", keys=(0, 1))):
            expected, within = model(**ids).logits, run()
            with model.model.language_model.layers[1].self_attn.q_proj.register_forward_pre_hook(hook):
                assert torch.equal(model(**ids).logits, expected)
        assert torch.equal(ran[1], within)
