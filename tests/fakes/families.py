"""Tiny random models with the configs of real checkpoints: what a family can choose, in the combinations that occur."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0625,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}

CHECKPOINTS = {
    "Llama 2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}),
    "Llama 3.1": ("llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}),
    "Llama 3.2": ("llama", {"rope_parameters": LLAMA3 | {"factor": 32.0}, "pretraining_tp": 1, "head_dim": 8}),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "SmolLM2": (
        "llama",
        {"_model_name_or_path": "x", "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000},
    ),
    "Mistral v0.3": ("mistral", {"sliding_window": None, "rope_theta": 1e6, "tie_word_embeddings": False}),
    "Mistral v0.1": ("mistral", {"sliding_window": 64}),
    "Mistral Nemo": ("mistral", {"head_dim": 4, "rope_theta": 1e6}),
    "Qwen2.5": ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
    "Qwen2.5 7B": ("qwen2", {"tie_word_embeddings": False, "use_mrope": False}),
    "Qwen2.5 with yarn": ("qwen2", {"rope_parameters": YARN}),
    "Qwen3": ("qwen3", {"head_dim": 16, "sliding_window": None}),
    "Qwen3 with biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "SmolLM3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "max_window_layers": 28}),
    "Granite 3": ("granite", GRANITE),
    "OLMo 2": ("olmo2", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}),
    "OLMo 2 with groups": ("olmo2", {"num_key_value_heads": 2}),
    "Phi-3 mini": ("phi3", {"num_key_value_heads": 4, "sliding_window": 63, "tie_word_embeddings": False}),
    "Phi-4": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 16, "tie_word_embeddings": False}),
}
"""Name of a checkpoint -> its `model_type` and what its config changes."""
