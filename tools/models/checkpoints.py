"""Values that configs of checkpoints have, and default configs lack: by model type, in the sizes of tiny models."""

from __future__ import annotations

from typing import Any

_PIXELS = {"<image>": 98, **{f"IMGIMG{'A' * (n < 10)}{chr(65 + n // 10)}{chr(65 + n % 10)}Z": 60 + n for n in range(30)}}
_INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 4, "compress_ratio": 2}
_INDEXED = {f"indexer_{name}": value for name, value in _INDEXER.items()}
_SPARSE = ["dense", "sparse"]
_TOKENS = {"<image>": 98, "<|extra_200|>": 97, **{f"<|visual token {n:06}|>": 60 + n for n in range(16)}}

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts_per_token": 2},
    "chameleon": {"vocabulary_map": _PIXELS, "image_token_id": 98},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": _SPARSE, "num_experts_per_tok": 2},
        "vision_config": {"sam_config": {"downsample_channels": [64, 64]}},
    },
    "dots3_note": {"text_config": {"head_dim": 32}},
    "dots3_note_text": {"head_dim": 32},
    "emu3": {
        "vocabulary_map": _TOKENS,
        "image_token_id": 98,
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 2, 2, 2], "codebook_size": 16},
    },
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2]}}
    },
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [0, 0, 1, 1], "downsample_rate": "2/4"},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "kimi_linear": {"num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "molmo2": {"vision_config": {"num_position_embeddings": 16}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "t5": {"decoder_start_token_id": 0},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [64, 64]}}},
    "xmod": {"default_language": "en_XX"},
}
