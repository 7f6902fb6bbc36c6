"""The recipes for TRL, as their page has them, with the library itself: `python -m tools.environments trl`."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
import transformers  # noqa: E402

image = pytest.importorskip("PIL.Image")

from tests.helpers import saved_models  # noqa: E402
from tests.helpers.trainers import fresh_state, weights  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "trl.md"
COLOURS = ("red", "blue")
EVIDENCE = torch.arange(16).view(4, 4)[1:3, 1:3].flatten()
PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
OPTIONS = {
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "bf16": False,
}

pytestmark = pytest.mark.filterwarnings("default")  # TRL calls what transformers has deprecated
__all__ = ["fresh_state"]  # pytest finds the fixture here


@pytest.fixture
def recipe() -> dict[str, Any]:
    variables: dict[str, Any] = {"__name__": "document"}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S):
        exec(compile(code, str(PAGE), "exec"), variables)
    return variables


@pytest.fixture
def given(tmp_path: Path) -> tuple[Any, Any, Any]:
    """A small LLaVA, its processor, and questions."""
    folder = saved_models.save_llava(tmp_path / "llava")
    evidence = torch.zeros(16, dtype=torch.bool).index_fill(0, EVIDENCE, True).tolist()
    rows = [
        {"prompt": PROMPT, "image": image.new("RGB", (24, 24), colour), "answer": colour, "evidence": evidence}
        for colour in COLOURS * 4
    ]
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    return model, transformers.AutoProcessor.from_pretrained(folder), datasets.Dataset.from_list(rows)


def test_without_weights_it_trains_as_grpo(recipe, given):
    model, processor, data = given
    trainer = recipe["AttentionGRPOTrainer"]
    trainer.evidence_weight = trainer.divergence_weight = 0.0
    before, results = model.state_dict(), []
    before = {name: x.clone() for name, x in before.items()}
    for kind in (trainer, trl.GRPOTrainer):
        recipe["AttentionGRPOTrainer"] = kind
        model.load_state_dict(before)
        recipe["train"](model, processor, data, max_steps=4, learning_rate=1e-3, **OPTIONS)
        results.append(weights(model).clone())
    assert torch.equal(*results) and not torch.equal(results[0], torch.cat([x.flatten() for x in before.values()]))


def test_the_terms_are_those_of_stored_maps(recipe, given):
    """In the second update, in which the policy has moved since it sampled."""
    model, processor, data = given
    calls = []

    class Recorded(recipe["AttentionGRPOTrainer"]):
        evidence_weight, divergence_weight = 0.3, 1e4  # small steps move attention little

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return output | {"old_map": stored(self.model, output)}

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            with torch.no_grad():
                plain = trl.GRPOTrainer._compute_loss(self, model, inputs)
            calls.append((inputs, stored(model, inputs), float(loss.detach() - plain)))
            return loss

    recipe["AttentionGRPOTrainer"] = Recorded
    recipe["train"](model, processor, data, max_steps=6, learning_rate=1e-2, **OPTIONS)
    moved = 0
    for inputs, maps, terms in calls:
        size, real = inputs["completion_ids"].shape[1], inputs["completion_mask"].double()
        a, b = (x[:, -size - 1 : -1] for x in (maps, inputs["old_map"]))
        is_image = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1) == model.config.image_token_id
        seen = torch.stack([row[:, kept] for row, kept in zip(a, is_image, strict=True)])  # (B, T, 16)
        share = (seen * inputs["evidence"][:, None]).sum(-1) / seen.sum(-1)
        good = real * (inputs["advantages"] > 0)[:, None]
        mean = (a + b) / 2
        js = (torch.special.xlogy(a, a) + torch.special.xlogy(b, b) - 2 * torch.special.xlogy(mean, mean)).sum(-1) / 2
        js = (inputs["advantages"][:, None].double() * js * real).sum() / real.sum()
        drawn = -(share.log() * good).sum() / good.sum().clamp(min=1)
        torch.testing.assert_close(terms, float(0.3 * drawn + 1e4 * js), rtol=1e-4, atol=1e-5)
        moved += abs(float(1e4 * js)) > 1e-3
    assert len(calls) == 6 and moved


LENGTHS = 5, 3, 7, 5  # of samples


@pytest.mark.parametrize("broken", [False, True])
def test_packed_rows_train_as_the_padded_batch(recipe: dict[str, Any], tmp_path: Path, broken: bool) -> None:
    """A batch of four, and a row of the same four. Broken: their tokens see one another in the frozen copy."""
    model, before = decoder(0), decoder(1)
    rows = [{"input_ids": torch.randint(3, 99, (length,)).tolist()} for length in LENGTHS]
    trained = []
    for packing, weight in ((False, 0.0), (False, 3.0), (True, 3.0)):
        ours = copy.deepcopy(model)
        options = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
        options |= {"packing": packing, "max_length": sum(LENGTHS), "per_device_train_batch_size": 1 if packing else 4}
        options |= {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        trainer = recipe["AttentionSFTTrainer"](
            ours,
            trl.SFTConfig(str(tmp_path), **options),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=saved_models.tokenizer(),
        )
        trainer.weight, trainer.before = weight, copy.deepcopy(before)
        if broken:
            seen = trainer.before.forward
            trainer.before.forward = lambda input_ids, use_cache, seen=seen, **_: seen(input_ids=input_ids, use_cache=use_cache)
        trainer.train()
        assert trainer.state.global_step == 3
        trained.append(weights(ours))
    without, padded, packed = trained
    assert float((padded - without).abs().max()) > 1e-3
    assert torch.allclose(packed, padded, rtol=0, atol=1e-6) != broken


def decoder(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    marks = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **marks, initializer_range=0.2))


@torch.no_grad()
def stored(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The mean map of the last layer (B, N, N), in float64."""
    tokens, real = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    outputs = model(input_ids=tokens, attention_mask=real, pixel_values=inputs["pixel_values"], output_attentions=True)
    model.set_attn_implementation(before)
    return outputs.attentions[-1].double().mean(1)
