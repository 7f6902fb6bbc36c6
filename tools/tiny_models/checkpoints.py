"""Values that configs of checkpoints have, and default configs lack: by model type, or by class, in the sizes of tiny models."""

from __future__ import annotations

from typing import Any

_PIXELS = {"<image>": 98, **{f"IMGIMG{'A' * (n < 10)}{chr(65 + n // 10)}{chr(65 + n % 10)}Z": 60 + n for n in range(30)}}
_HYBRID = ["linear_attention", "full_attention"]
_INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 4, "compress_ratio": 2}
_INDEXED = {f"indexer_{name}": value for name, value in _INDEXER.items()}
_SPARSE = ["dense", "sparse"]
_BLOCKS = {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2}
_ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
_ZAMBA |= {"attention_hidden_size": 128, "attention_head_dim": 32}
_TOKENS = {"<image>": 98, "<|extra_200|>": 97, **{f"<|visual token {n:06}|>": 60 + n for n in range(16)}}

# Towers of timm have their sizes only in these arguments.
_FASTVIT = {
    **{"inference_mode": True, "layers": [1, 1], "embed_dims": [16, 32], "mlp_ratios": [2, 2], "se_downsamples": [False, False]},
    **{"downsamples": [False, True], "pos_embs": [None, None], "token_mixers": ["repmixer", "attention"]},
}
_PERCEPTION = {
    **{"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [32, 32], "patch_size": 8, "ref_feat_shape": [4, 4]},
    **{"global_pool": "", "init_values": 0.1, "use_post_transformer_norm": False},
}

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "Blip2ForImageTextRetrieval": {"qformer_config": {"use_qformer_text_input": True}},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "align": {
        "vision_config": {"num_block_repeats": [1] * 7, "width_coefficient": 0.25, "depth_coefficient": 1.0},
        **{"projection_dim": 80},
    },
    "bailing_hybrid": {"num_experts_per_token": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 32},
    "chameleon": {"vocabulary_map": _PIXELS, "image_token_id": 98},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": _SPARSE, "num_experts_per_tok": 2},
        "vision_config": {"sam_config": {"downsample_channels": [64, 64]}},
    },
    "diffusion_gemma": {"text_config": {"sliding_window": 64}, "canvas_length": 4},
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
    "esm": {"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 98},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "fast_vlm": {"vision_config": {"model_args": _FASTVIT, "hidden_size": 64}},
    "gemma3n": {
        "vision_config": {"model_args": {"channel_multiplier": 0.05, "msfa_output_resolution": 4}, "hidden_size": 2048},
        "vision_soft_tokens_per_image": 16,
    },
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [0, 0, 1, 1], "downsample_rate": "2/4"},
    "granitemoehybrid": {"layer_types": _HYBRID, "mamba_d_head": 32},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_experts_per_token": 2},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "mamba2": {"head_dim": 32, "n_groups": 2},
    "minimax_m3_vl": {"text_config": _BLOCKS},
    "minimax_m3_vl_text": _BLOCKS,
    "mllama": {"vision_config": {"vision_output_dim": 128}},
    "mobilebert": {"intra_bottleneck_size": 64},
    "molmo2": {"vision_config": {"num_position_embeddings": 16}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "nemotron_h_omni": {"image_token_id": 98},
    "perception_lm": {
        "vision_config": {"architecture": "vit_pe_core_large_patch14_336", "model_args": _PERCEPTION},
        **{"vision_use_cls_token": True, "projector_pooling_ratio": 2},
    },
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8], "max_position_embeddings": 64},
    "rwkv": {"use_cache": False},  # whose state is written into
    "t5": {"decoder_start_token_id": 0},
    "tapas": {"type_vocab_sizes": [3, 256, 256, 2, 256, 256, 10]},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [64, 64]}}},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "hybrid_layer_ids": [1, 3], "mamba_headdim": 32},
}
