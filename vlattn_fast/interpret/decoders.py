"""Records of decoders: language models, and those that see images."""

from __future__ import annotations

from dataclasses import replace

from vlattn_fast.interpret.records import Family, Tower

_DECODER = Tower("language", "model.language_model", "layers", "target", "image_text", branch="self_attn")
_TEXT = replace(_DECODER, path="model", tokens="text")

DECODERS: dict[str, Family] = {
    "LlavaForConditionalGeneration": Family((_DECODER,), "token"),
    "Qwen2VLForConditionalGeneration": Family((_DECODER,), "token"),
    "Qwen2_5_VLForConditionalGeneration": Family((_DECODER,), "token"),
    "LlamaForCausalLM": Family((_TEXT,), "token"),
    "Qwen2ForCausalLM": Family((_TEXT,), "token"),
}
