"""Tiny settings for every causal-LM model type of the installed transformers: a few layers, width 32, 128 tokens."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, LENGTH, BATCH, LAYERS = 128, 12, 2, 4

# Names that configurations use, by the value that each gets where it exists.
_BY_VALUE = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (32, "hidden_size d_model n_embd dim emb_dim word_embed_proj_dim embedding_size embedding_dim"),
    (48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner dff ffn_hidden_size"),
    (16, "moe_intermediate_size shared_expert_intermediate_size kv_lora_rank q_lora_rank qk_head_dim index_head_dim"),
    (LAYERS, "num_hidden_layers num_layers n_layer n_layers decoder_layers"),
    (1, "encoder_layers n_group topk_group bos_token_id"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts index_topk linear_num_heads"),
    (2, "num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts index_n_heads"),
    (8, "head_dim attention_head_dim sliding_window qk_nope_head_dim qk_rope_head_dim v_head_dim linear_head_dim"),
    (8, "hidden_size_per_layer_input laurel_rank mamba_d_state mamba_chunk_size"),
    (8, "linear_key_head_dim linear_value_head_dim"),
    (2, "linear_num_key_heads"),
    (4, "linear_num_value_heads"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    (0, "pad_token_id"),
    (2, "eos_token_id"),
    (True, "output_router_logits is_decoder"),
    (False, "add_cross_attention use_cache"),
)
GENERIC = {name: value for value, names in _BY_VALUE for name in names.split()}

# Settings by model type, over the generic ones.
_MLA = {"num_key_value_heads": 4, "head_dim": 8}  # latent attention: as many key heads as query heads
_SLIDING = ["sliding_attention", "full_attention"] * 2
_DOTS3 = {
    **_MLA,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
    "shared_experts_intermediate_size": 16,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "vocab_size": 260,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "axk2": _MLA,
    "bailing_hybrid": {**_MLA, "n_group": 1, "partial_rotary_factor": 1.0, "layer_group_size": 2},
    "bamba": {"mamba_n_heads": 8, "mamba_d_state": 8, "attn_layer_indices": [1, 3]},
    "beam": {"partial_rotary_factor": 1.0},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        }
    },
    "cpmant": {
        "dim_ff": 48,
        "dim_head": 8,
        "prompt_length": 4,
        "prompt_types": 4,
        "segment_types": 4,
        "init_std": 0.02,
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v3": {**_MLA, "first_k_dense_replace": 1},
    "deepseek_v32": _MLA,
    "deepseek_v4": {"o_lora_rank": 8, "o_groups": 2, "num_key_value_heads": 1, "num_nextn_predict_layers": 0},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _SLIDING, "intermediate_size": 48},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": _SLIDING},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_state": 8, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hy_v4": _MLA,
    "kimi_linear": _MLA,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 16, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2},
    "minicpm3": {**_MLA, "dim_model_base": 32},
    "ministral": {"head_dim": 8},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_vocab_size": 32,
        "shape_vocab_size": 32,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": _MLA,
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "mamba_d_state": 8,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


# Why a type cannot be examined, where its error does not say it.
KNOWN = {
    "gemma4_assistant": "drafts for a larger model whose keys and values it reads, so it does not train alone",
    "gemma4_unified_assistant": "drafts for a larger model whose keys and values it reads, so it does not train alone",
    "musicgen": "AutoModelForCausalLM cannot build it from its own configuration",
    "musicgen_melody": "AutoModelForCausalLM cannot build it from its own configuration",
}


def no_dropout(values: dict) -> dict:
    words = ("dropout", "pdrop", "layerdrop", "drop_rate", "jitter")
    return {
        k: 0.0
        for k, v in values.items()
        if any(w in k for w in words) and isinstance(v, int | float) and not isinstance(v, bool)
    }


def tiny_config(model_type: str):
    config_class = CONFIG_MAPPING[model_type]
    special = SPECIAL.get(model_type, {})
    return _tiny(config_class, special)


def _tiny(config_class, special):
    """A small configuration; blocks of a composite one are made small in the same way."""
    defaults = config_class()
    values = {**vars(defaults)}
    kwargs = no_dropout(values)
    for name, value in GENERIC.items():
        if name in values and values[name] is not None and name not in special:
            kwargs[name] = value
    named = {
        k: CONFIG_MAPPING[v["model_type"]] for k, v in special.items() if isinstance(v, dict) and "model_type" in v
    }
    blocks = {k: type(getattr(defaults, k, None)) for k in config_class.sub_configs or {}} | named
    for name, block in blocks.items():
        if hasattr(block, "sub_configs"):
            kwargs[name] = _tiny(block, special.get(name, {})).to_dict()
    kwargs.update({k: v for k, v in special.items() if k not in kwargs or not isinstance(v, dict)})
    return config_class(**kwargs)


def model_types() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str, device: str = "cpu"):
    """A tiny random model, the same for the same type; on meta without data."""
    config = tiny_config(model_type)
    if device == "meta":
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).train()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # zero biases, gates and the like would hide mistakes
            if p.is_floating_point():
                p += 0.02 * torch.randn(p.shape, generator=generator)
    return model


def tiny_inputs(model_type: str, batch: int = BATCH, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """What the type's forward takes: tokens, and labels to train on (not where the type's own loss wants an image)."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids} if model_type in ("git",) else {"input_ids": ids, "labels": ids}
