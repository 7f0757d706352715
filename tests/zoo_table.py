"""What the small models of tests/zoo.py need beyond the sizes that all families share: one line a family."""

from typing import Any

TRANSFORMERS = (5, 24)  # whose families these tables name; an older one lacks some
# Sizes by the names that configs have for them. A config gets those of its own names only.
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # fewer than ranks at tp=4
    "head_dim": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": None,  # Transformers gives the embedding of this token no gradient
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 9,  # of 24 tokens
    "initializer_range": 0.02,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # attention to the keys that an indexer picks
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 4,
    # linear attention and state-space layers
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 8,
    "linear_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "chunk_size": 16,
}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
QWEN_WINDOWS = {"use_sliding_window": True, "max_window_layers": 1} | WINDOWS
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# The biases by layer are lists of the default's length, and a window has heads of its own.
INKLING = {
    "unpadded_vocab_size": 256,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "rel_extent": 16,
    "d_rel": 4,
    "sliding_window_size": 9,
    "n_layers_per_attn_res_block": 1,
}
GEMMA4 = {
    "pad_token_id": 0,  # None is refused by the whole model's forward pass; the batch does not have the token
    "num_hidden_layers": 4,  # the last two use the keys of the first two
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,  # global layers have wider heads
}
PER_LAYER_INPUT = {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 8}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

# `...` takes a value away: the config computes it.
OVERRIDES: dict[str, dict[str, Any]] = {
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},
    "bamba": {"layer_types": ..., "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere2_moe": DENSE_FIRST | {"num_shared_experts": 1},
    "cohere_compass_text": WINDOWS | {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 4,
        "o_lora_rank": 8,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "doge": {"keep_window_size": 8},
    "dots3_note": {
        "vision_config": VISION | {"adapter_in_dim": 32, "adapter_out_dim": 64, "mlp_layer_types": ["dense"]},
        "audio_config": VISION | {"adapter_input_size": 32, "adapter_out_dim": 64, "downsample_hidden_size": 8},
    },
    "dots3_note_text": {  # its local layers have sizes of their own
        "shared_experts_intermediate_size": 32,
        "head_dim": 16,
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 8,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": WINDOWS | {"n_shared_experts": 1},
    "emu3_text_model": {"pad_token_id": 0},  # None is refused; the batch does not have the token
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "falcon": {"head_dim": ...},
    "falcon_h1": {"layer_types": ..., "mamba_d_ssm": 128},
    "flint": {"mlp_only_layers": [0]},
    "gemma3": {"vision_config": VISION | {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    }
    | PER_LAYER_INPUT,
    "gemma4": {"vision_config": None, "audio_config": None},
    "gemma4_text": GEMMA4
    | PER_LAYER_INPUT
    | {"enable_moe_block": True, "top_k_experts": 2, "use_double_wide_mlp": False},
    "gemma4_unified": {"vision_config": None, "audio_config": None},
    "gemma4_unified_text": GEMMA4,
    "gptj": {"rotary_dim": 8},
    "granite_swa": WINDOWS,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "inkling2_loop_text": INKLING
    | {
        "num_hidden_layers": 4,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 4,
    },
    "inkling2_text": INKLING,
    "inkling_text": INKLING | DENSE_FIRST,
    "jamba": {
        "layer_types": ...,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "laguna": WINDOWS,
    "lfm2": CONVOLUTIONS | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": CONVOLUTIONS,
    "llama4_text": {
        "num_experts_per_tok": 1,  # as the released models: its router multiplies the inputs
        "intermediate_size_mlp": 96,
        "moe_layers": [1],
        "attention_chunk_size": 9,
        "no_rope_layers": [1, 0],
    },
    "longcat_flash": {
        "num_hidden_layers": ...,  # each layer is two of these
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "mellum": WINDOWS | DENSE_FIRST,
    "minimax": {"block_size": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "dense_intermediate_size": 96,
        "rotary_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    }
    | DENSE_FIRST,
    "ministral": WINDOWS,
    "opt": {"ffn_dim": 96},
    "phi4_multimodal": {
        "vision_config": VISION | {"image_size": 28, "crop_size": 28, "patch_size": 14},
        "audio_config": VISION
        | {
            "num_blocks": 1,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 16,
            "bias_max_distance": 8,
        },
    },
    "phimoe": {"router_jitter_noise": 0.2},  # it draws experts in training; without noise its router has no gradient
    "qwen2": QWEN_WINDOWS,
    "qwen2_moe": QWEN_WINDOWS | {"mlp_only_layers": [0]},
    "qwen3": QWEN_WINDOWS,
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {
        "layer_types": ...,
        "head_dim": ...,
        "sliding_window": ...,
        "attention_window_size": 9,
        "num_hidden_layers": 3,
        "lru_width": 64,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "xglm": {"ffn_dim": 96},
}
# Families without a plan that are built here as well.
PLANLESS = (
    "biogpt",
    "bitnet",
    "bloom",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox_japanese",
    "jetmoe",
    "mpt",
    "opt",
    "persimmon",
    "recurrent_gemma",
    "stablelm",
    "xglm",
)
# Families that are not built here, with the reason.
ABSENT: dict[str, str] = {
    "gemma3n": "its image tower needs the packages timm and PIL; gemma3n_text is its text model",
}
# Parameters that get no gradient in one process, by a part of their names, with the reason.
NO_GRADIENT = {
    ".indexer.": "picks keys, and no gradient flows through what is picked",
    "expert_bias": "is added to choose experts only",
    "e_score_correction_bias": "is added to choose experts only",
    "z_L_init": "hrm_text: a constant that is saved as a parameter",
    "vision_tower.": "there are no images in the batch",
    "multi_modal_projector.": "there are no images in the batch",
    "embed_tokens_extend.": "phi4_multimodal: there are no images and no sound in the batch",
}
