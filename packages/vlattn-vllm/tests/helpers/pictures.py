"""Scenario: BLIP-2 with a picture, whose tokens are a group, beside transformers' maps and `va.token_grounding`; on one rank and
on two."""

from __future__ import annotations

from tests.helpers.tiny import close, engine, sampling, with_tokenizer

# isort: split
import tempfile
from typing import Any, NamedTuple

import numpy as np
import torch

import vlattn_fast as va

PICTURE = 511  # the token that stands for a part of a picture
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ASK = {"groups": "image|question|answer", "statistics": ["mass", "image_entropy", "diagonal", "received", "received_answer"]}


class Model(NamedTuple):
    """`prompt` has a place for each picture, where the processor makes none. `sizes`: widths and heights of the pictures, which
    become `parts` tokens together."""

    folder: str
    model: Any
    processor: Any
    prompt: str
    sizes: tuple[tuple[int, int], ...]
    parts: int


def main() -> None:
    model = blip()
    for ranks in (1, 2):
        check(model, ranks)


def check(one: Model, ranks: int) -> None:
    """Mass on the pictures, the question and the answer, and what each token receives, from the engine and from eager maps."""
    llm = engine(one.folder, skip_tokenizer_init=False, max_num_batched_tokens=64, tensor_parallel_size=ranks)
    pictures = random_pictures(one.sizes)
    prompt = {"prompt": one.prompt, "multi_modal_data": {"image": pictures}}
    (output,) = llm.generate([prompt], sampling(5, ASK), use_tqdm=False)
    inputs = one.processor(images=pictures, text=one.prompt, return_tensors="pt")
    tokens = list(output.outputs[0].token_ids)
    core = va.token_grounding(one.model, dict(inputs), answer=[tokens[:-1]], maps=False).numbers
    ids = inputs.pop("input_ids")
    assert ids[0].tolist() == output.prompt_token_ids and int((ids == PICTURE).sum()) == one.parts
    whole = torch.cat([ids, torch.tensor([tokens[:-1]])], 1)
    for name in ("attention_mask", "mm_token_type_ids"):  # of the prompt alone
        inputs.pop(name, None)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (whole == PICTURE).int()
    with torch.no_grad():
        outputs = one.model(input_ids=whole, **inputs, output_attentions=True)
    maps = torch.stack(getattr(outputs, "language_model_outputs", outputs).attentions)[:, 0]
    rows, prompt_tokens = maps[:, :, ids.shape[1] - 1 :].permute(2, 0, 1, 3), ids.shape[1]
    in_picture = whole[0] == PICTURE
    in_picture[prompt_tokens:] = False
    in_answer = torch.arange(len(in_picture)) >= prompt_tokens
    groups = torch.stack([in_picture, ~in_picture & ~in_answer, in_answer], 1).float()
    attention = output.outputs[0].attention
    close(attention.mass, rows @ groups)
    close(attention.received, maps[..., :prompt_tokens].sum(2))
    for name, values in attention.grounding().items():  # the last token has no query, so the core's answer is without it
        close(values[:-1], core[name][0].float())
    assert len(attention.grounding()) == 6
    assert attention.groups == ("image", "question", "answer") and attention.mass[..., 0].std() > 0.03
    print(type(one.model).__name__, ranks, "ranks", float((attention.mass - rows @ groups).abs().max()))
    llm.llm_engine.engine_core.shutdown()


def random_pictures(sizes: tuple[tuple[int, int], ...]) -> list[Any]:
    from PIL import Image

    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def saved_model(model: Any, processor: Any, folder: str, prompt: str, sizes: tuple[tuple[int, int], ...], parts: int) -> Model:
    """The model in the folder, with attention that is far from even."""
    for name, weight in model.named_parameters():
        if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data.mul_(6)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model = type(model).from_pretrained(folder, attn_implementation="eager").float().eval()
    return Model(folder, model, processor, prompt, sizes, parts)


def blip() -> Model:
    """Its processor puts the picture before the text."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**VISION, image_size=24, patch_size=6).to_dict(),
        qformer_config=transformers.Blip2QFormerConfig(**VISION, vocab_size=64, encoder_hidden_size=32).to_dict(),
        text_config=transformers.OPTConfig(
            vocab_size=512, hidden_size=128, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=128
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=PICTURE,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    model.language_projection.weight.data.mul_(20)
    folder = with_tokenizer(tempfile.mkdtemp(), image=PICTURE)
    images = transformers.BlipImageProcessor(size={"height": 24, "width": 24})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.Blip2Processor(images, tokenizer, num_query_tokens=4)
    one = saved_model(model, processor, folder, "w20 w21 w22 w23 w24", ((24, 24),), 4)
    one.processor.image_token = transformers.AddedToken("<image>")  # it reads the tokenizer's text as one
    return one


if __name__ == "__main__":
    main()
