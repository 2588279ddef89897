"""Headers of well-known models at their real widths, in the layouts of the tools: files that hold nothing.

A file is a safetensors header and a hole, so that a whole layer of any model costs no memory and no time.
Names and configs are those that published checkpoints have; numbers of layers and experts are cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Entry = tuple[str, tuple[int, ...]]  # dtype, shape
Entries = dict[str, Entry]
BYTES = {"F32": 4, "I32": 4, "U32": 4, "I64": 8, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def write_holes(folder: Path, tensors: Entries, config: dict, **documents: dict) -> Path:
    """A folder whose one file has these tensors, all zeros that lie nowhere."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, values in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES.get(dtype, 1) * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return folder


@dataclass(frozen=True)
class Model:
    """``linears``: module -> (out, in) of what tools quantize; ``plain``: what they leave alone."""

    config: dict
    linears: dict[str, tuple[int, int]]
    plain: Entries = field(default_factory=dict)
    biases: frozenset[str] = frozenset()  # modules with a bias


def decoder(
    architecture: str,
    hidden: int,
    inner: int,
    heads: int,
    kv: int,
    head_dim: int,
    vocab: int,
    *,
    prefix: str = "model.",
    tied: bool = False,
    bias: bool = False,
    qk_norm: bool = False,
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    experts: tuple[int, int] = (0, 0),  # how many, how wide
    names: str = "mlp.experts.{n}.{leaf}_proj",
    router: str = "mlp.gate",
    fused: bool = False,
    layers: int = 1,
    head: str = "lm_head",
    **more: object,
) -> Model:
    """A decoder whose attention has Q, K, V and O."""
    linears: dict[str, tuple[int, int]] = {}
    plain: Entries = {f"{prefix}embed_tokens.weight": ("BF16", (vocab, hidden))}
    biases = set()
    for number in range(layers):
        at = f"{prefix}layers.{number}."
        q, k = heads * head_dim, kv * head_dim
        attention = {"q_proj": (q, hidden), "k_proj": (k, hidden), "v_proj": (k, hidden)}
        if fused:
            attention = {"qkv_proj": (q + 2 * k, hidden)}
        biases |= {f"{at}self_attn.{leaf}" for leaf in attention if bias}
        linears |= {f"{at}self_attn.{leaf}": shape for leaf, shape in attention.items()}
        linears[f"{at}self_attn.o_proj"] = (hidden, q)
        if qk_norm:
            plain |= {f"{at}self_attn.{leaf}_norm.weight": ("BF16", (head_dim,)) for leaf in "qk"}
        plain |= {f"{at}{norm}.weight": ("BF16", (hidden,)) for norm in norms}
        count, width = experts
        if count:
            plain[f"{at}{router}.weight"] = ("BF16", (count, hidden))
        for expert in range(count or 1):
            where = names if count else "mlp.{leaf}_proj"
            for leaf in ("gate", "up", "down"):
                shape = (width or inner, hidden) if leaf != "down" else (hidden, width or inner)
                linears[at + where.format(n=expert, leaf=leaf)] = shape
        if fused:
            for leaf in ("gate", "up"):
                del linears[f"{at}mlp.{leaf}_proj"]
            linears[f"{at}mlp.gate_up_proj"] = (2 * inner, hidden)
    plain[f"{prefix}norm.weight"] = ("BF16", (hidden,))
    if not tied:
        plain[f"{head}.weight"] = ("BF16", (vocab, hidden))
    config = {
        "architectures": [architecture],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    return Model(config | more, linears, plain, frozenset(biases))


GEMMA_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


def _gemma(prefix: str = "model.") -> Model:
    return decoder(
        *("Gemma3ForCausalLM", 1152, 6912, 4, 1, 256, 262144),
        prefix=prefix,
        tied=True,
        qk_norm=True,
        norms=GEMMA_NORMS,
        model_type="gemma3_text",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        sliding_window=512,
        sliding_window_pattern=6,
        rope_local_base_freq=10000,
        rope_theta=1000000,
    )


def _seeing_gemma(prefix: str) -> Model:
    text = _gemma(prefix)
    config = {k: v for k, v in text.config.items() if k not in ("architectures", "torch_dtype")}
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "dtype": "bfloat16",
        "text_config": config,
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    tower = tower if prefix.startswith("language_model") else f"model.{tower}"
    return Model(whole, text.linears, {**text.plain, tower: ("BF16", (1152, 1152))})


def _deepseek(
    hidden: int, heads: int, q_rank: int, dense: int, width: int, shared: int, vocab: int, last: bool = True
) -> Model:
    """DeepSeek's latent attention, a dense layer, one of 4 experts of ``width``, and with ``last`` the
    prediction layer behind them. ``shared``: the width of the MLP beside the experts."""
    layers, kv_rank, rotary, nope, value = 2, 512, 64, 128, 128
    linears: dict[str, tuple[int, int]] = {}
    plain: Entries = {"model.embed_tokens.weight": ("BF16", (vocab, hidden))}
    for number in range(layers + last):
        at = f"model.layers.{number}."
        queries = heads * (nope + rotary)
        linears |= (
            {f"{at}self_attn.q_a_proj": (q_rank, hidden), f"{at}self_attn.q_b_proj": (queries, q_rank)}
            if q_rank
            else {f"{at}self_attn.q_proj": (queries, hidden)}
        )
        linears |= {
            f"{at}self_attn.kv_a_proj_with_mqa": (kv_rank + rotary, hidden),
            f"{at}self_attn.kv_b_proj": (heads * (nope + value), kv_rank),
            f"{at}self_attn.o_proj": (hidden, heads * value),
        }
        mlps = {"mlp": dense}
        if number:
            mlps = {"mlp.shared_experts": shared} | {f"mlp.experts.{n}": width for n in range(4)}
            plain[f"{at}mlp.gate.weight"] = ("BF16", (4, hidden))
            if last:
                plain[f"{at}mlp.gate.e_score_correction_bias"] = ("F32", (4,))
        for name, inner in mlps.items():
            linears |= {f"{at}{name}.{leaf}_proj": (inner, hidden) for leaf in ("gate", "up")}
            linears[f"{at}{name}.down_proj"] = (hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain[f"{at}{norm}.weight"] = ("BF16", (hidden,))
        if q_rank:
            plain[f"{at}self_attn.q_a_layernorm.weight"] = ("BF16", (q_rank,))
        plain[f"{at}self_attn.kv_a_layernorm.weight"] = ("BF16", (kv_rank,))
    if last:
        at = f"model.layers.{layers}."
        norms = ("enorm", "hnorm", "shared_head.norm")
        plain |= {f"{at}{name}.weight": ("BF16", (hidden,)) for name in norms}
        plain[f"{at}eh_proj.weight"] = ("BF16", (hidden, 2 * hidden))
        plain[f"{at}embed_tokens.weight"] = ("BF16", (vocab, hidden))
        plain[f"{at}shared_head.head.weight"] = ("BF16", (vocab, hidden))
    plain |= {"model.norm.weight": ("BF16", (hidden,)), "lm_head.weight": ("BF16", (vocab, hidden))}
    config = {
        "architectures": ["DeepseekV3ForCausalLM" if last else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if last else "deepseek_v2",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "hidden_size": hidden,
        "intermediate_size": dense,
        "moe_intermediate_size": width,
        "num_hidden_layers": layers,
        **({"num_nextn_predict_layers": 1} if last else {}),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": q_rank or None,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rotary,
        "v_head_dim": value,
        "n_routed_experts": 4,
        "n_shared_experts": shared // width,
        "num_experts_per_tok": 2,
        "n_group": 2 if last else 1,
        "topk_group": 1,
        "topk_method": "noaux_tc" if last else "greedy",
        "scoring_func": "sigmoid" if last else "softmax",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "ep_size": 1,
        "hidden_act": "silu",
        "vocab_size": vocab,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Model(config, linears, plain)


LLAMA3 = ("LlamaForCausalLM", 4096, 14336, 32, 8, 128, 128256)
MODELS: dict[str, Callable[[], Model]] = {
    "llama3-8b": lambda: decoder(*LLAMA3, model_type="llama"),
    "llama3-8b-pairs": lambda: decoder(*LLAMA3, model_type="llama", layers=2),
    "qwen2.5-0.5b": lambda: decoder(
        *("Qwen2ForCausalLM", 896, 4864, 14, 2, 64, 151936), tied=True, bias=True, model_type="qwen2"
    ),
    "qwen3-4b": lambda: decoder(
        *("Qwen3ForCausalLM", 2560, 9728, 32, 8, 128, 151936), tied=True, qk_norm=True, model_type="qwen3"
    ),
    "gemma3-1b": _gemma,
    "gemma3-seeing-old": lambda: _seeing_gemma("language_model.model."),
    "gemma3-seeing-new": lambda: _seeing_gemma("model.language_model."),
    "phi3-mini": lambda: decoder(
        *("Phi3ForCausalLM", 3072, 8192, 32, 32, 96, 32064), fused=True, model_type="phi3"
    ),
    "mixtral": lambda: decoder(
        *("MixtralForCausalLM", 4096, 14336, 32, 8, 128, 32000),
        experts=(4, 14336),
        names="block_sparse_moe.experts.{n}.{leaf}",
        router="block_sparse_moe.gate",
        model_type="mixtral",
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "qwen3-30b-a3b": lambda: decoder(
        *("Qwen3MoeForCausalLM", 2048, 6144, 32, 4, 128, 151936),
        experts=(8, 768),
        qk_norm=True,
        model_type="qwen3_moe",
        num_experts=8,
        num_experts_per_tok=4,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "deepseek-v3": lambda: _deepseek(7168, 128, 1536, 18432, 2048, 2048, 129280),
    "deepseek-v2-lite": lambda: _deepseek(2048, 16, 0, 10944, 1408, 2816, 102400, last=False),
}
_W123 = {".gate": ".w1", ".up": ".w3", ".down": ".w2"}


def model(name: str) -> Model:
    """One of ``MODELS``; Mixtral's experts are called w1, w2, w3."""
    found = MODELS[name]()
    if name != "mixtral":
        return found

    def spelled(module: str) -> str:
        stem, dot, leaf = module.rpartition(".")
        return stem + _W123.get(dot + leaf, dot + leaf)

    return Model(found.config, {spelled(k): v for k, v in found.linears.items()}, found.plain, found.biases)
