"""What GGUF files call the tensors of each family (llama.cpp's ``gguf`` package).

    canonical (Hugging Face's name, stacked experts without a number)      GGUF
    model.layers.{n}.mlp.experts.gate_proj                  .weight        blk.{n}.ffn_gate_exps .weight

A key is a module, and ``.weight`` or ``.bias`` follows on both sides; the keys of ``WHOLE`` are tensors, with
nothing after them. Observed in files that llama.cpp's converter wrote (tests/fixtures/gguf_families, whose
README.md has every tensor and every metadata key). What the same name holds differently there:

- ``llama`` files (Llama, Mistral, Mixtral), Granite and SmolLM3: rows of Q and K, and of their biases, as
  adjacent rotary pairs (2.7.4). All others: as in the checkpoint; DeepSeek's, GLM-4's and Command-R's rotate
  adjacent pairs in both.
- Gemma: 1 is already added to every norm's weight, Q's and K's and the last one too.
- Phi-3: Q, K, V are one matrix, and so are gate and up, gate above up; GLM-4's gate and up, too.
- Experts are stacked (experts, out, in). gpt-oss: gate and up, rows in turn in the checkpoint, are two
  tensors each for weight and bias, and (in, out) has become (out, in).
- DeepSeek: ``kv_b_proj`` is cut by heads: ``k_b_proj`` (heads, kv_lora_rank, qk_nope_head_dim), transposed
  in each head, and ``v_b_proj`` (heads, v_head_dim, kv_lora_rank). Older files have ``kv_b_proj`` whole.

Tied embeddings leave ``output`` out; Gemma's files never have it.
"""

from __future__ import annotations

_LAYER = "model.layers.{n}."

_ROOT = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    # Made by the converter from the config: what the rotary frequencies are divided by.
    "rope_freqs": "rope_freqs",
    "rope_factors_long": "rope_factors_long",
    "rope_factors_short": "rope_factors_short",
}
_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_LATENT_ATTENTION = {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
}
_MLP = {
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",  # Phi-3 keeps gate and up in one matrix
    "mlp.down_proj": "ffn_down",
}
_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps",  # with the converter's --fuse-gate-up-exps; gate above up
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}


def _of_layers(names: dict[str, str]) -> dict[str, str]:
    return {_LAYER + canonical: "blk.{n}." + stored for canonical, stored in names.items()}


WHOLE = _of_layers(
    {
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    }
)

# All but those below.
GGUF_NAMES = _ROOT | _of_layers(_ATTENTION | _LATENT_ATTENTION | _MLP | _EXPERTS) | WHOLE

# Gemma 2 and 3 have four norms a layer: the one before the MLP keeps the MLP's name. OLMo 2 has two of them.
GEMMA_GGUF_NAMES = GGUF_NAMES | _of_layers(
    {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
)

# GLM-4's four norms.
GLM4_GGUF_NAMES = GGUF_NAMES | _of_layers(
    {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"}
)

# gpt-oss, GLM-4.5 and Seed-OSS: the same norm as Llama's, under another name.
POST_NORM_GGUF_NAMES = GGUF_NAMES | _of_layers({"post_attention_layernorm": "post_attention_norm"})

# Qwen3-Next and Qwen3.5. Files of the first have Q, K, V and z in one matrix as checkpoints do (ssm_in), or
# Q, K and V, each of all heads in turn, apart from z. ssm_a is -exp(A_log), and 1 is added to every norm's
# weight but ssm_norm's. Qwen3.5's value heads are tiled: value head j of key head g is number
# j * (key heads) + g of the file, in matrices (columns of ssm_out too), vectors and ssm_conv1d.
QWEN_NEXT_GGUF_NAMES = POST_NORM_GGUF_NAMES | _of_layers(
    {
        "linear_attn.in_proj_qkvz": "ssm_in",
        "linear_attn.in_proj_qkv": "attn_qkv",
        "linear_attn.in_proj_z": "attn_gate",
        "linear_attn.in_proj_ba": "ssm_ba",
        "linear_attn.in_proj_b": "ssm_beta",
        "linear_attn.in_proj_a": "ssm_alpha",
        "linear_attn.conv1d": "ssm_conv1d",
        "linear_attn.A_log": "ssm_a",
        "linear_attn.dt_bias": "ssm_dt.bias",
        "linear_attn.norm": "ssm_norm",
        "linear_attn.out_proj": "ssm_out",
    }
)

# The larger models have a norm each for attention and MLP; that of the MLP has the place of the others' one.
FALCON_GGUF_NAMES = GGUF_NAMES | _of_layers({"ln_attn": "attn_norm_2", "ln_mlp": "attn_norm"})
BITNET_GGUF_NAMES = GGUF_NAMES | _of_layers(
    {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}
)

# MiniMax-M2 and K-EXAONE: the correction lies beside the router, not in it.
CORRECTED_GGUF_NAMES = GGUF_NAMES | _of_layers({"mlp.e_score_correction_bias": "exp_probs_b.bias"})
HUNYUAN_GGUF_NAMES = GGUF_NAMES | _of_layers(
    {f"mlp.shared_mlp.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}
)
