"""The stored outcomes of `python -m tools.model_classes` and their page: some are measured again, none is wrong."""

import inspect
import json
import typing
from importlib.metadata import version

import pytest
import torch
import transformers

from tests.helpers.interpret.cases import TEXT, lively
from tools.model_classes.compare import mixed_beside_attention, outcome_of
from tools.model_classes.run import EDITS, HELD, TABLE, UNCHANGED, classes
from tools.pages.models_page import KINDS, MAPPED, listed_models, measured_models, row
from vlattn_fast.interpret.adapters.encoders import ENCODERS
from vlattn_fast.interpret.adapters.two_towers import LINKED

OLDER = tuple(map(int, version("transformers").split(".")[:2])) < (5, 23)  # than that of the table
LLAMA = dict(TEXT, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)

# A layer that shares keys, one list in another, a head called "decoder", masks that depend on tokens, learnt tokens in front,
# attention by einsum over (N, B, C); pictures in packed patches, in tiles, by pooled patches.
SOME = {
    "causal": [
        "gemma3n_text",
        "longcat_flash",
        "modernbert-decoder",
        "falcon",
        "bloom",
        "prophetnet",
        "lfm3",
        "doge",
        "inkling2_text",
        "cpmant",
        "xlnet",
    ],
    # Cross-attention behind a gate, a decoder beside the keys of its encoder's layers, tokens of a picture in words.
    "image-text": ["qwen3_vl_moe", "aya_vision", "molmo2", "qwen3_5", "idefics", "mllama", "diffusion_gemma", "chameleon"],
    "zero-shot": ["tipsv2", "siglip2"],  # no record lists the first; a learnt query reads the other
    "sequence": ["t5", "t5gemma2", "pegasus_x"],  # keys of encoder and decoder in one call, blocks of tokens beside a map
    "text": ["gptj", "eurobert", "funnel", "mobilebert"],  # written out, a mean of the real tokens, pooled queries, trigrams
    "image": ["ijepa"],
}


@pytest.mark.parametrize(("mapping", "kind"), [(mapping, kind) for mapping, kinds in SOME.items() for kind in kinds])
def test_some_rows_of_the_table(mapping, kind):
    name, outcome, _ = json.loads(TABLE.read_text(encoding="utf-8"))[mapping][kind]
    if kind not in classes(mapping) and OLDER:
        pytest.skip(f"this transformers has no {name}")
    assert classes(mapping)[kind] == name
    row = outcome_of(mapping, name)
    assert row.outcome == outcome, row.reason


def test_no_row_of_the_table_is_wrong():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    outcomes = {outcome for rows in table.values() if isinstance(rows, dict) for _, outcome, _ in rows.values()}
    assert "equal" in outcomes and "wrong" not in outcomes


@pytest.mark.parametrize(("mixer", "beside"), [("full_attention", False), ("conv", False), ("conv", True)])
def test_the_table_sees_tokens_that_meet_beside_attention(mixer, beside):
    """Where nothing of the package runs, tokens that meet in an MLP are seen. A short convolution has a map, as attention has."""
    sizes = {**LLAMA, "num_hidden_layers": 2, "layer_types": [mixer, "full_attention"]}
    torch.manual_seed(0)
    config = transformers.Lfm2Config(**sizes)
    config._attn_implementation = "eager"
    model = lively(transformers.Lfm2ForCausalLM(config)).eval()
    if beside:
        model.model.layers[0].feed_forward.register_forward_hook(lambda module, args, states: states + states.roll(1, 1))
    inputs = {"input_ids": torch.arange(3, 9)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    assert mixed_beside_attention(model, inputs, torch.tensor([5])) == beside


def test_the_tables_show_every_class():
    """What was measured, by a line or among those that are equal, and each listed record."""
    measured, listed = measured_models(), listed_models()
    for number, file in enumerate((TABLE, EDITS, HELD, UNCHANGED)):
        part = measured.split("\n## ")[number]
        for mapping, rows in json.loads(file.read_text(encoding="utf-8")).items():
            if mapping in MAPPED:
                section = part.split(f"\n### {MAPPED[mapping]}\n")[1].split("\n### ")[0]
                assert f"{len(rows)} model types: " in section
                for name, outcome, _ in rows.values():
                    assert f"`{name}`" in section or (outcome == "equal" and file != TABLE), (file.name, name)
    for adapters in KINDS.values():
        for name, adapter in adapters.items():
            assert row(name, adapter) in listed


def test_a_class_without_logits_has_no_default_score():
    """What the forward pass of a class of transformers gives says so itself."""
    transformers = pytest.importorskip("transformers")
    seen = {True: 0, False: 0}
    for name, adapter in {**ENCODERS, **LINKED}.items():
        if adapter.score != "class" or (model := getattr(transformers, name, None)) is None:
            continue
        returned = inspect.signature(inspect.unwrap(model.forward)).return_annotation
        outputs = [kind for kind in typing.get_args(returned) or (returned,) if hasattr(kind, "__dataclass_fields__")]
        assert len(outputs) == 1, f"{name}: {returned}"
        has_logits = adapter.logits in outputs[0].__dataclass_fields__
        assert ("| largest logit |" in row(name, adapter)) == has_logits, name
        seen[has_logits] += 1
    assert all(seen.values())
