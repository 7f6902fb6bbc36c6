"""QKClip: the rule by hand, the models that it takes, and training that diverges without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.two_ranks import results_of

TAU = 0.5


def ids() -> Tensor:
    return torch.randint(0, 50, (2, 12))


def llama(**changes: Any) -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **changes}))


def gpt2() -> Any:
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, **tokens))


def gemma2() -> Any:
    """In its default attention, written by hand with a softcap; every second layer has a window."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8, "sliding_window": 5}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, **heads, attn_logit_softcapping=0.4))


def bert() -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertModel(transformers.BertConfig(**sizes))


def multihead(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(16, 2, batch_first=True, **options)


def run_ids(model: nn.Module) -> Callable[[], Any]:
    tokens = ids()
    return lambda: model(input_ids=tokens)


def run_states(model: nn.Module) -> Callable[[], Any]:
    query, memory = 10 * torch.randn(2, 5, 16), 10 * torch.randn(2, 7, model.kdim)
    return lambda: model(query, memory, torch.randn(2, 7, model.vdim))


def sharpened(model: Any) -> Any:
    """With large logits in every layer, also where a model's first weights are small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "query", "key", "c_attn")):
                parameter.mul_(30)
    return model.eval()


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Callable[[], Any]]]] = {
    "grouped heads, rotary": (llama, run_ids),
    "written by hand": (lambda: llama(attn_implementation="eager"), run_ids),
    "written by hand, softcap": (gemma2, run_ids),
    "fused, transposed": (gpt2, run_ids),
    "biases": (bert, run_ids),
    "multihead": (multihead, run_states),
    "multihead, other sizes": (lambda: multihead(kdim=12, vdim=8), run_states),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_come_down_to_the_threshold(name: str) -> None:
    """In the first layer, whose input stays as it was, each head that passed the threshold has it as its largest logit."""
    make, runs = MODELS[name]
    model = sharpened(make())
    run = runs(model)
    with va.nn.QKClip(model, threshold=TAU) as clip:
        run()
        first = clip.step()
        path, heads = next(iter(first.items()))
        assert len(heads) >= 2 and all(logit > TAU for logit in heads.values())
        clip.threshold = TAU * 0.5  # all heads are seen once more
        run()
        second = clip.step()[path]
    for head in heads:
        assert second[head] == pytest.approx(TAU, rel=1e-5)


def test_the_rule() -> None:
    """gamma^(1/2) for the smallest gamma of a group's heads on their key, what is left of its own gamma on each query; biases,
    too; values and other heads stay."""
    model = sharpened(llama(num_hidden_layers=1, attention_bias=True))
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        nn.init.normal_(projection.bias)
    before = {name: x.clone() for name, x in model.named_parameters()}
    with va.nn.QKClip(model, threshold=25.0) as clip:
        model(input_ids=ids())
        (heads,) = clip.step().values()
    gamma = torch.tensor([25.0 / heads[head] if head in heads else 1.0 for head in range(4)])
    assert 0 < len(heads) and (gamma < 1).sum() == len(heads)
    of_keys = gamma.view(2, 2).amin(1).sqrt()
    factors = {"k_proj": of_keys, "q_proj": gamma / of_keys.repeat_interleave(2)}
    for name, parameter in model.named_parameters():
        factor = next((x for part, x in factors.items() if part in name), None)
        wanted = (
            before[name] if factor is None else before[name] * factor.repeat_interleave(8).view(-1, *[1] * (parameter.ndim - 1))
        )
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-6, atol=0)


def test_the_largest_of_several_batches_counts() -> None:
    model = multihead()
    x = 10 * torch.randn(2, 5, 16)
    with va.nn.QKClip(model, TAU) as clip:
        model(2 * x, x, x)
        model(x, x, x)
        with torch.no_grad():
            model(0.01 * x, x, x)
        clip.step()
        clip.threshold = TAU * 0.5
        model(2 * x, x, x)
        (heads,) = clip.step().values()
    assert list(heads.values()) == pytest.approx([TAU, TAU], rel=1e-5)


def test_logits_below_the_threshold_leave_everything() -> None:
    model = multihead()
    before = [x.clone() for x in model.parameters()]
    x = 0.01 * torch.randn(2, 5, 16)
    with va.nn.QKClip(model, 100.0) as clip:
        model(x, x, x)
        assert clip.step() == {}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_trainer_that_fails_and_evaluates(tmp_path: Any) -> None:
    """An exception leaves the context that is entered around training, and the callback can train again. Evaluation between two
    steps counts for neither."""
    model = sharpened(llama())
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 50, (8, 6))]
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "report_to": "none"}
    options |= {"eval_strategy": "steps", "eval_steps": 1}
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", **options)
    clip = va.nn.QKClip(model, TAU)
    seen: list[int] = []
    steps: list[dict[str, Any]] = []
    inner = clip.step
    clip.step = lambda: steps.append(inner()) or steps[-1]  # type: ignore[func-returns-value, method-assign]

    class Notes(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seen.append(clip._current.calls)

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            if len(seen) == 1:
                raise KeyboardInterrupt

    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[clip.trainer_callback(), Notes()]
    )
    with pytest.raises(KeyboardInterrupt), clip:
        trainer.train()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    steps.clear()
    trainer.train()
    assert seen[1:] == [0, 0] and len(steps) == 2
    assert set(steps[0]) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")
    attention = multihead()

    class Training(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            out, _ = self.attention(batch, batch, batch)
            return out.square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    model = Training()
    clip = va.nn.QKClip(model, TAU)
    steps: list[dict[str, Any]] = []
    inner = clip.step
    clip.step = lambda: steps.append(inner()) or steps[-1]  # type: ignore[func-returns-value, method-assign]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    fit = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=2, accumulate_grad_batches=2, callbacks=[clip.lightning_callback()], **quiet
    )
    fit.fit(model, torch.utils.data.DataLoader(10 * torch.randn(8, 5, 16), batch_size=2))
    assert len(steps) == 2 and set(steps[0]) == {"attention"}


def on_two_ranks() -> dict[str, Tensor]:
    """The weights after a step, where one of the processes has large logits; and those of three kinds of projections, which are
    sharded where there are processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    several, x = torch.distributed.is_initialized(), 10 * torch.randn(2, 5, 16)
    model, states = multihead(), 0.01 * x if several and torch.distributed.get_rank() == 0 else x
    with va.nn.QKClip(model, TAU) as clip:
        model(states, states, states)
        clip.step()
    weights = {"of one process": model.in_proj_weight.detach()}
    models: list[tuple[Any, Callable[[Any], Any]]] = [(sharpened(make()), lambda model: model(ids())) for make in (llama, gpt2)]
    for i, (model, run) in enumerate([*models, (multihead(), lambda model: model(x, x, x))]):
        if several:
            mesh = init_device_mesh("cpu", (2,))
            for layer in (module for module in model.modules() if type(module).__name__ in ("LlamaAttention", "GPT2Attention")):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        torch.manual_seed(1)
        with va.nn.QKClip(model, TAU) as clip:
            run(model)
            assert clip.step()
        for name, parameter in model.named_parameters():
            weights[f"{i} {name}"] = getattr(parameter, "full_tensor", lambda parameter=parameter: parameter)().detach()
    return weights


def test_the_largest_logit_among_processes_counts_and_shards_are_rescaled(tmp_path: Path) -> None:
    """Sharded parameters take the place of those that the forward pass uses."""
    whole, ranks = on_two_ranks(), results_of("tests.nn.test_qk_clip", "on_two_ranks", tmp_path)
    for name, weight in whole.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], weight, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_weights_that_are_replaced_between_steps() -> None:
    model, x = multihead(), 10 * torch.randn(2, 5, 16)
    with va.nn.QKClip(model, TAU) as clip:
        model(x, x, x)
        clip.step()
        model.in_proj_weight.data = 2 * model.in_proj_weight.data
        model(x, x, x)
        assert clip.step()
        clip.threshold = TAU * 0.5
        model(x, x, x)
        (heads,) = clip.step().values()
    assert list(heads.values()) == pytest.approx([TAU, TAU], rel=1e-5)


def test_a_compiled_model_runs_as_plain_python() -> None:
    model = torch.compile(multihead(), backend="eager")
    x = 10 * torch.randn(2, 5, 16)
    with va.nn.QKClip(model, TAU) as clip:
        model(x, x, x)
        assert clip.step()
