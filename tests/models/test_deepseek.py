"""DeepSeek V2 and V3 against transformers in float32: latent attention, routing, YaRN, chunks, extra layers.

Sizes in sixteens run on the native attention kernel, the others on the reference.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from forward_helpers import allocate, chunk_batch, differences, prompt_logits
from gguf_writing import GgufTensor, write_gguf
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.attention import choose_attention
from lowbit.kernels.head_products import HeadMatrices
from lowbit.kernels.reference import Reference
from lowbit.layers.rotary import rotary_frequencies
from lowbit.loading import load_model, plan_model
from lowbit.loading.source_modules import SourceModel
from lowbit.models.families.deepseek import read_config
from lowbit.models.model import Model
from models.family_cases import check_logits

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "beta_fast": 32,
    "beta_slow": 1,
}
NATIVE = {"kv_lora_rank": 80, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16}
GROUPS = {"q_lora_rank": 32, "n_group": 4, "topk_group": 2}
CASES = {
    "DeepseekV2 lite": {"q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.5},
    "DeepseekV2": {"q_lora_rank": 32, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "DeepseekV3": {"q_lora_rank": 32, "n_group": 4, "topk_group": 2, "rope_parameters": YARN},
    "DeepseekV3 one group": {"q_lora_rank": 48, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "DeepseekV2 lite, yarn, native": {
        **NATIVE,
        "q_lora_rank": None,
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "DeepseekV2 native, biases": {
        **NATIVE,
        "q_lora_rank": 32,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "DeepseekV3 native, biases": {**NATIVE, **GROUPS, "attention_bias": True, "rope_parameters": YARN},
    "DeepseekV3 native, rotated halves": {**NATIVE, **GROUPS, "rope_interleave": False},
    "Glm4MoeLite": {"q_lora_rank": 32, "num_attention_heads": 5, "num_key_value_heads": 5},
    "Glm4MoeLite native, in groups": {
        **NATIVE,
        **GROUPS,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "rope_interleave": False,
    },
    "DeepseekV3 native, as wide as published": {
        **GROUPS,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_parameters": {**YARN, "mscale_all_dim": 1.0},
    },
}


GGUF = Path(__file__).parents[1] / "fixtures" / "gguf_families" / "deepseek2.gguf"


def make_checkpoint(case: str, folder: Path) -> transformers.PreTrainedModel:
    """Random weights, norms and router corrections, saved by transformers."""
    name = case.split()[0]
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **CASES[case]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
        for buffer_name, buffer in model.named_buffers():
            if "correction" in buffer_name:
                buffer.uniform_(-0.3, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    model = check_logits(tmp_path, make_checkpoint(case, tmp_path))
    kernel = choose_attention(model.cache_specs()[0], model.device).name
    assert kernel == ("cpu" if "native" in case and native.library() is not None else "reference")


def in_chunks(model: Model, prompt: list[int], sizes: list[int]) -> torch.Tensor:
    """The logits of a prompt that comes in pieces."""
    pages = [3, 0, 4, 2, 1, 6, 5, 7, 8, 9][: -(-len(prompt) // 16)]
    caches, done, parts = allocate(model, 10), 0, []
    for size in sizes:
        parts.append(model.forward(chunk_batch([(prompt[done : done + size], done, pages)]), caches))
        done += size
    assert done == len(prompt)
    return torch.cat(parts)


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
@pytest.mark.parametrize("case", ["DeepseekV2 lite, yarn, native", "DeepseekV3 native, biases"])
def test_same_bits_alone_together_and_in_chunks(case: str, tmp_path: Path) -> None:
    make_checkpoint(case, tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(1, 131, (n,), generator=generator).tolist() for n in (150, 1, 33)]
    together = prompt_logits(model, prompts)
    for prompt, logits in zip(prompts, together, strict=True):
        [alone] = prompt_logits(model, [prompt])
        assert alone.equal(logits)
    assert in_chunks(model, prompts[0], [17, 64, 5, *[1] * 20, 44]).equal(together[0])


def test_native_and_reference_attention_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint("DeepseekV3 native, as wide as published", tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    prompt = torch.randint(1, 131, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    [found] = prompt_logits(model, [prompt])
    monkeypatch.setattr(native, "library", lambda: None)
    assert choose_attention(model.cache_specs()[0], model.device).name == "reference"
    [wanted] = prompt_logits(model, [prompt])
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_bfloat16_cache_stays_close(tmp_path: Path) -> None:
    oracle = make_checkpoint("DeepseekV3 native, as wide as published", tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu", kv_cache_dtype="bf16")
    assert model.cache_specs()[0].token_bytes() == 2 * 576
    prompt = torch.randint(1, 131, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    [found] = prompt_logits(model, [prompt])
    with torch.no_grad():
        wanted = oracle(torch.tensor([prompt])).logits[0].log_softmax(-1)
    found = found.log_softmax(-1)
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() <= 0.005


def test_chunks_and_decode(tmp_path: Path) -> None:
    make_checkpoint("DeepseekV3", tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    prompt = torch.randint(1, 131, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    [whole] = prompt_logits(model, [prompt])
    parts = in_chunks(model, prompt, [17, 20, 1, 1, 1])
    assert torch.allclose(parts, whole, atol=1e-4 * float(whole.abs().max()))


def test_cache_holds_the_latent_only(tmp_path: Path) -> None:
    make_checkpoint("DeepseekV3", tmp_path)
    header = open_checkpoint(str(tmp_path))
    plan = plan_model(header)
    [spec] = set(plan.cache_specs)
    assert (spec.kind, spec.k_dim, spec.v_dim) == ("latent", 24 + 8, 24)
    assert plan.kv_bytes_per_token == 3 * 32 * spec.dtype.k.bits // 8
    unpacked = [module for module in plan.modules if module.kernel == "unpacked"]
    assert len(unpacked) == 3 and unpacked[0].nbytes == 4 * (4 * 36) * 24
    caches = allocate(load_model(header, device="cpu"), 5)
    assert sum(buffer.numel() for buffer in caches[0].buffers.values()) == 5 * 16 * 32


def test_prediction_layers_are_left_alone(tmp_path: Path) -> None:
    make_checkpoint("DeepseekV3", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.ones(2, 2)}, file)
    load_model(open_checkpoint(str(tmp_path)), device="cpu")
    save_file({**tensors, "model.layers.1.eh_proj.weight": torch.ones(2, 2)}, file)
    with pytest.raises(LowbitError, match="eh_proj"):
        load_model(open_checkpoint(str(tmp_path)), device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("topk_method", "random", "E0242"),
        ("scoring_func", "tanh", "E0242"),
        ("n_group", 3, "E0216"),
        ("topk_group", 5, "E0216"),
        ("kv_lora_rank", None, "E0216"),
        ("first_k_dense_replace", -1, "E0216"),
        ("num_experts_per_tok", 0, "E0216"),
        ("num_experts_per_tok", 5, "E0216"),
        ("n_group", 8, "E0216"),
        ("routed_scaling_factor", None, "E0216"),
        ("hidden_act", "relu", "E0242"),
        ("v_head_dim", 24, "E0210"),
    ],
)
def test_bad_configs(key: str, value: object, code: str, tmp_path: Path) -> None:
    make_checkpoint("DeepseekV3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(LowbitError) as caught:
        plan_model(open_checkpoint(str(tmp_path)))
    assert caught.value.code == code


def test_a_plan_holds_no_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of DeepSeek-V3 they would be 4 GB of float32."""
    packed: list[HeadMatrices] = []
    pack = HeadMatrices.pack
    monkeypatch.setattr(HeadMatrices, "pack", lambda *given: packed.append(pack(*given)) or packed[-1])
    make_checkpoint("DeepseekV3", tmp_path)
    for path in (tmp_path, GGUF):
        plan_model(open_checkpoint(str(path)))
        assert packed and all(matrices.weights.is_meta for matrices in packed)
        packed.clear()


def test_no_shared_expert(tmp_path: Path) -> None:
    """``n_shared_experts`` may be null: the routed experts are all there is."""
    oracle = make_checkpoint("DeepseekV2 lite", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "shared_experts" in name:
                parameter.zero_()
    save_file({name: tensor for name, tensor in tensors.items() if "shared_experts" not in name}, file)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_shared_experts": None}))
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    prompt = list(range(1, 60))
    [logits] = prompt_logits(model, [prompt])
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt])).logits[0]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_an_input_multiplier_is_folded_into_kv_b(tmp_path: Path) -> None:
    """ModelOpt's ``pre_quant_scale`` multiplies the input of a matrix that has none once it is absorbed."""
    oracle = make_checkpoint("DeepseekV3", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(6)
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.kv_b_proj"
        weight = tensors[f"{name}.weight"]
        multiplier = torch.rand(weight.shape[1], generator=generator) + 0.5
        scale = (weight / multiplier).abs().amax(1) / 127
        codes = (weight / multiplier / scale[:, None]).round()
        tensors |= {f"{name}.weight": codes.to(torch.int8), f"{name}.weight_scale": scale}
        tensors |= {f"{name}.pre_quant_scale": multiplier, f"{name}.input_scale": torch.tensor(0.02)}
        with torch.no_grad():
            oracle.get_submodule(name).weight.copy_(codes * scale[:, None] * multiplier)
    save_file(tensors, file)
    quantization = {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL", "ignore": ["lm_head"]}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu", dtype="float32")
    prompt = list(range(1, 60))
    [logits] = prompt_logits(model, [prompt])
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt])).logits[0]
    worst = differences(logits, expected).max()
    assert worst <= 1e-4
    absorbed = [one for one in plan_model(open_checkpoint(str(tmp_path))).modules if "kv_b" in one.name]
    assert absorbed and all(one.scheme.activation is None for one in absorbed)
    assert {one.computes for one in absorbed} == {"as stored, inputs not quantized"}


BLOCK = 48  # ragged at the edge of most matrices


def in_fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, weight_scale_inv, what they stand for), a scale for each block."""
    out, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -out % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3)) / 448
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:out, :columns]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * spread


@pytest.mark.parametrize("case", ["DeepseekV3", "DeepseekV2 native, biases"])
def test_fp8_blocks_as_published(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix in blocks but embedding, head and router; kv_b is unpacked from them."""
    oracle = make_checkpoint(case, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, state = load_file(file), oracle.state_dict()
    with torch.no_grad():
        for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
            if ".mlp.gate." in name or not name.startswith("model.layers."):
                continue
            codes, scales, values = in_fp8_blocks(tensors[name])
            tensors |= {name: codes, f"{name}_scale_inv": scales}
            stack, _, rest = name.partition(".experts.")
            if not rest:
                state[name].copy_(values)
                continue
            number, leaf, _ = rest.split(".")
            if leaf == "down_proj":
                state[f"{stack}.experts.down_proj"][int(number)].copy_(values)
            else:
                gate, up = state[f"{stack}.experts.gate_up_proj"][int(number)].chunk(2)
                (gate if leaf == "gate_proj" else up).copy_(values)
    assert sum(name.endswith("_scale_inv") for name in tensors) > 50
    save_file(tensors, file)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    monkeypatch.setattr("lowbit.formats.fp8.Fp8._activation", lambda *_: None)
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu", dtype="float32")
    prompt = list(range(1, 60))
    [logits] = prompt_logits(model, [prompt])
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt])).logits[0]
    assert differences(logits, expected).max() <= 1e-3


def in_mlx_groups(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(what mlx-lm stores of (heads, out, in) in 4 bits and groups of 32, what that is worth)."""
    groups = weight.unflatten(-1, (-1, 32))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low) / 15
    codes = ((groups - low[..., None]) / scales[..., None]).round().clamp(0, 15)
    worth = (codes * scales[..., None] + low[..., None]).flatten(-2)
    eights = codes.flatten(-2).long().unflatten(-1, (-1, 8))
    words = (eights << 4 * torch.arange(8)).sum(-1).to(torch.uint32)
    return {"weight": words, "scales": scales, "biases": low}, worth


@pytest.mark.parametrize("packed", [False, True])
def test_halves_of_kv_b_as_mlx_lm_has_them(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """embed_q (heads, rank, nope) and unembed_out (heads, v, rank): plain, or in groups."""
    sizes = {"q_lora_rank": 32, "n_group": 4, "topk_group": 2, "kv_lora_rank": 64, "qk_nope_head_dim": 32}
    monkeypatch.setitem(CASES, "DeepseekV3 halves", sizes)
    model = make_checkpoint("DeepseekV3 halves", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn"
        k, v = tensors.pop(f"{name}.kv_b_proj.weight").unflatten(0, (4, -1)).split((32, 20), 1)
        halves = {"embed_q": k.transpose(1, 2), "unembed_out": v}
        for half, weight in halves.items():
            stored, worth = in_mlx_groups(weight) if packed else ({"weight": weight}, weight)
            tensors |= {f"{name}.{half}.{part}": x.contiguous() for part, x in stored.items()}
            halves[half] = worth
        whole = torch.cat([halves["embed_q"].transpose(1, 2), halves["unembed_out"]], 1).flatten(0, 1)
        with torch.no_grad():
            model.get_submodule(f"{name}.kv_b_proj").weight.copy_(whole)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "mlx"})
    if packed:
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization"] = {"group_size": 32, "bits": 4}
        (tmp_path / "config.json").write_text(json.dumps(config))
    check_logits(tmp_path, model, lengths=(3, 20))
    source = SourceModel(open_checkpoint(str(tmp_path)))
    wholes = [one for one in source.modules if one.target.name.endswith("kv_b_proj")]
    assert len(wholes) == 3 and all(one.latent is not None for one in wholes)
    with TensorData(source.header) as data:
        written = source.read(wholes[2], data).weight.dequantize()
    assert torch.equal(written, model.get_submodule("model.layers.2.self_attn.kv_b_proj").weight)


def test_older_gguf_files_keep_the_matrix_whole(tmp_path: Path) -> None:
    """Before the absorbed form: kv_b_proj in one tensor, the heads' sizes under the plain keys."""
    new = open_checkpoint(str(GGUF))
    with TensorData(new) as data:
        tensors = {name: data.tensor(name).clone() for name in new.tensors}
    for layer in range(2):
        k = tensors.pop(f"blk.{layer}.attn_k_b.weight").transpose(1, 2)
        v = tensors.pop(f"blk.{layer}.attn_v_b.weight")
        tensors[f"blk.{layer}.attn_kv_b.weight"] = torch.cat([k, v], 1).flatten(0, 1).contiguous()
    metadata = dict(new.metadata)
    for name in ("key", "value"):
        key = f"deepseek2.attention.{name}_length"
        metadata[key] = metadata.pop(f"{key}_mla")
    metadata["deepseek2.attention.head_count_kv"] = metadata["deepseek2.attention.head_count"]
    kinds = {torch.float16: "F16", torch.float32: "F32"}
    write_gguf(
        tmp_path / "old.gguf",
        metadata,
        [
            GgufTensor(name, kinds[x.dtype], tuple(x.shape), x.numpy().tobytes())
            for name, x in tensors.items()
        ],
    )
    prompt = list(range(2, 50))
    found, wanted = (
        prompt_logits(load_model(open_checkpoint(str(path)), device="cpu", dtype="float32"), [prompt])[0]
        for path in (tmp_path / "old.gguf", GGUF)
    )
    assert found.equal(wanted)


PUBLISHED_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
COMMON = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
}
# The keys as the models' authors published them, with transformers 4.
PUBLISHED = {
    "V2-Lite": COMMON
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 102400,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": None,
        "rope_scaling": {**PUBLISHED_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "V3": COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "vocab_size": 129280,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "rope_scaling": {**PUBLISHED_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    header = CheckpointHeader(Path(name), "safetensors", {}, PUBLISHED[name])
    config = read_config(header)
    lite = name == "V2-Lite"
    assert (config.heads, config.head_dim, config.rotary_dim) == (16 if lite else 128, 192, 64)
    assert (config.kv_lora_rank, config.nope_dim, config.v_dim) == (512, 128, 128)
    moe = config.moe
    assert moe is not None
    assert (config.q_lora_rank, min(moe.layers)) == ((0, 1) if lite else (1536, 3))
    assert moe.layers == frozenset(range(min(moe.layers), config.layers))
    assert (moe.experts, moe.per_token) == ((64, 6) if lite else (256, 8))
    assert moe.shared_size == (2816 if lite else 2048)
    routing = ("softmax_top_k", 1, 1) if lite else ("group_sigmoid", 8, 4)
    assert (moe.routing, moe.groups, moe.kept_groups) == routing
    assert (moe.renormalize, moe.scale) == ((False, 1.0) if lite else (True, 2.5))
    # softmax_scale * yarn_get_mscale(40, mscale_all_dim) ** 2 of the authors' code
    assert config.attention_scale == pytest.approx(0.11472 if lite else 0.13523, rel=1e-4)
    assert config.rotates_neighbours and config.tied_head is False
    frequencies, magnitude = rotary_frequencies(64, config.rope_theta, config.rope_scaling)
    assert magnitude == 1.0 and frequencies[0] == 1.0
