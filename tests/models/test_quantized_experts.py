"""Mixtures of experts: every spelling of their names, and experts in several formats, against "
"transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from forward_helpers import differences, prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model, plan_model
from lowbit.numerics.number_formats import number_format
from oracles import gptq as gptq_oracle

EXPERTS, HIDDEN, INNER = 4, 64, 64
TOKENS = torch.randint(1, 64, (30,), generator=torch.Generator().manual_seed(3)).tolist()
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
}


def made(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(9)
    more: dict[str, object] = {"num_local_experts": EXPERTS, "sliding_window": None}
    if name == "Qwen3Moe":
        more = {
            "num_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "head_dim": 16,
            "norm_topk_prob": True,
        }
    if name == "Qwen2Moe":
        more = {
            "num_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "shared_expert_intermediate_size": INNER,
        }
    if name == "Glm4Moe":
        more = {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "head_dim": 16,
            "first_k_dense_replace": 0,
        }
    if name == "Olmoe":
        more = {"num_experts": EXPERTS}
    if name == "GptOss":
        more = {"num_local_experts": EXPERTS, "head_dim": 16, "sliding_window": 16}
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SIZES, **more)
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                parameter.normal_(0, 0.2)
    return model.eval()


def per_expert(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """The state under canonical names, gate_proj, up_proj and down_proj of each expert apart."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            for expert, weight in enumerate(tensor):
                gate, up = weight.chunk(2)
                tensors |= {f"{stem}.{expert}.gate_proj.weight": gate, f"{stem}.{expert}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix(".down_proj")
            tensors |= {f"{stem}.{expert}.down_proj.weight": weight for expert, weight in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def write(
    folder: Path, model: transformers.PreTrainedModel, tensors: dict[str, Tensor], quantization: dict | None
) -> Path:
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def distances(folder: Path, model: transformers.PreTrainedModel) -> Tensor:
    loaded = load_model(open_checkpoint(str(folder)), device="cpu", dtype="float32")
    [logits] = prompt_logits(loaded, [TOKENS])
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0]
    return differences(logits, wanted)


def spelled(leaves: dict[str, str], container: str) -> Callable[[str], str]:
    def rename(name: str) -> str:
        name = name.replace(".mlp.experts.", f".{container}.experts.").replace(
            ".mlp.gate.", f".{container}.gate."
        )
        for old, new in leaves.items():
            name = name.replace(f".{old}.weight", f".{new}.weight") if ".experts." in name else name
        return name

    return rename


W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
SPELLINGS = {
    "transformers 4": spelled(W123, "block_sparse_moe"),
    "llm-compressor, auto-round": spelled({}, "block_sparse_moe"),
    "gptqmodel": spelled({}, "mlp"),
    "w1 under mlp": spelled(W123, "mlp"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_mixtral_under_every_spelling(case: str, tmp_path: Path) -> None:
    model = made("Mixtral")
    tensors = {SPELLINGS[case](name): tensor for name, tensor in per_expert(model).items()}
    assert distances(write(tmp_path, model, tensors, None), model).max() <= 1e-4


def test_stacked_experts(tmp_path: Path) -> None:
    """transformers 5 keeps them stacked in memory; a checkpoint may be that, too."""
    model = made("Qwen3Moe")
    assert distances(write(tmp_path, model, dict(model.state_dict()), None), model).max() <= 1e-4


def quantize_experts(
    model: transformers.PreTrainedModel, quantize: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
) -> dict[str, Tensor]:
    """Stored tensors with quantized experts; the model itself gets the dequantized ones."""
    tensors, dequantized = per_expert(model), {}
    for name in [name for name in tensors if ".experts." in name]:
        stored, values = quantize(tensors.pop(name))
        dequantized[name] = values
        tensors |= {f"{name.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in stored.items()}
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            stem = name.rpartition(".")[0]
            for expert in range(EXPERTS):
                if name.endswith("experts.gate_up_proj"):
                    parts = [dequantized[f"{stem}.{expert}.{leaf}_proj.weight"] for leaf in ("gate", "up")]
                    tensor[expert] = torch.cat(parts)
                elif name.endswith("experts.down_proj"):
                    tensor[expert] = dequantized[f"{stem}.{expert}.down_proj.weight"]
    return tensors


def fp8_block(weight: Tensor, size: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    blocks = weight.unflatten(0, (-1, size)).unflatten(2, (-1, size))  # (rows, size, columns, size)
    scales = blocks.abs().amax((1, 3)) / 448
    spread = scales.repeat_interleave(size, 0).repeat_interleave(size, 1)
    codes = (weight / spread).to(torch.float8_e4m3fn)
    values = codes.float() * spread
    return {"weight": codes, "weight_scale_inv": scales}, values


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.unflatten(1, (-1, 32))
    scales = (groups.abs().amax(2) / 7).half()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 8  # (out, groups, 32)
    values = ((codes - 8) * scales.float()[..., None]).flatten(1)
    packed = gptq_oracle.stream(codes.flatten(1).T.numpy().astype(np.int64), 4)
    zeros = np.full((groups.shape[1], weight.shape[0] // 8), 0x77777777, np.uint32)
    stored = {
        "qweight": torch.from_numpy(packed.view(np.int32).copy()),
        "qzeros": torch.from_numpy(zeros.view(np.int32)),
        "scales": scales.T.contiguous(),
    }
    return stored, values


def int8_channel(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


FORMATS: dict[str, tuple[Callable, dict]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}),
    "fp8": (
        fp8_block,
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    ),
    "w8a8_int8": (int8_channel, {"quant_method": "w8a8_int8"}),
}


QUANTIZED = [(name, fmt) for name in ("Mixtral", "Qwen3Moe") for fmt in FORMATS]
QUANTIZED += [("Qwen2Moe", "gptq"), ("Qwen2Moe", "fp8"), ("Glm4Moe", "fp8"), ("Olmoe", "gptq")]


@pytest.mark.parametrize(("name", "fmt"), QUANTIZED)
def test_quantized_experts(name: str, fmt: str, tmp_path: Path) -> None:
    quantize, config = FORMATS[fmt]
    model = made(name)
    tensors = quantize_experts(model, quantize)
    folder = write(tmp_path, model, tensors, config)
    plan = plan_model(open_checkpoint(str(folder)))
    experts = [module for module in plan.modules if ".experts." in module.name]
    assert len(experts) == 2 * EXPERTS * 3 and not any(module.scheme.is_dense for module in experts)
    found = distances(folder, model)
    # gptq: inputs rounded to bfloat16 by the kernel; the others quantize them, which may tip a router
    assert found.max() <= 0.03 if fmt == "gptq" else found.median() <= 0.1


def test_stacked_fp8_experts(tmp_path: Path) -> None:
    model = made("Qwen3Moe")
    apart = quantize_experts(model, fp8_block)
    stacked = {name: tensor for name, tensor in apart.items() if ".experts." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        for suffix, tail in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            gate, up, down = (
                torch.stack([apart[f"{stem}.{e}.{leaf}_proj.{suffix}"].float() for e in range(EXPERTS)])
                for leaf in ("gate", "up", "down")
            )
            dtype = torch.float8_e4m3fn if suffix == "weight" else torch.float32
            stacked[f"{stem}.gate_up_proj{tail}"] = torch.cat((gate, up), 1).to(dtype)
            stacked[f"{stem}.down_proj{tail}"] = down.to(dtype)
    folder = write(tmp_path / "stacked", model, stacked, FORMATS["fp8"][1])
    loaded = load_model(open_checkpoint(str(folder)), device="cpu", dtype="float32")
    reference = load_model(
        open_checkpoint(str(write(tmp_path / "apart", model, apart, FORMATS["fp8"][1]))),
        device="cpu",
        dtype="float32",
    )
    first, second = prompt_logits(loaded, [TOKENS])[0], prompt_logits(reference, [TOKENS])[0]
    assert torch.equal(first, second)


def gpt_oss_one_by_one(
    model: transformers.PreTrainedModel, gate_up: str, down: str, router: str
) -> dict[str, Tensor]:
    """The state with (out, in) matrices of each expert; gate and up in turn, or taken apart."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stack, found, leaf = name.rpartition(".mlp.experts.")
        stack += found
        suffix = "bias" if leaf.endswith("_bias") else "weight"
        if not found:
            tensors[name.replace(".router.", f".{router}.")] = tensor
            continue
        for number, own in enumerate(tensor):
            matrix = own if suffix == "bias" else own.T
            if leaf.startswith("down"):
                tensors[f"{stack}{down.format(number)}.{suffix}"] = matrix
            elif "," in gate_up:
                for first, spelling in enumerate(gate_up.split(",")):
                    tensors[f"{stack}{spelling.format(number)}.{suffix}"] = matrix[first::2]
            else:
                tensors[f"{stack}{gate_up.format(number)}.{suffix}"] = matrix
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


GPT_OSS = {
    "unsloth": ("gate_up_projs.{}", "down_projs.{}", "router.linear"),
    "gptqmodel": ("gate_up.{}", "down.{}", "router"),
    "numbered first": ("{}.gate_up_proj", "{}.down_proj", "router"),
    "auto-round, llm-compressor": ("{}.gate_proj,{}.up_proj", "{}.down_proj", "router"),
}


@pytest.mark.parametrize("case", GPT_OSS)
def test_gpt_oss_one_by_one(case: str, tmp_path: Path) -> None:
    """A matrix of gate and up has them in turn, under whatever name; matrices of their own do not."""
    model = made("GptOss")
    folder = write(tmp_path, model, gpt_oss_one_by_one(model, *GPT_OSS[case]), None)
    assert distances(folder, model).max() <= 1e-4


def nf4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """bitsandbytes' 4 bits, as unsloth stores gpt-oss: blocks of 64, the even code in the high nibble."""
    table = number_format("nf4").table()
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1)
    codes = (blocks / scales[:, None]).unsqueeze(-1).sub(table).abs().argmin(-1)
    pairs = codes.to(torch.uint8).view(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored = {
        "weight": (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous(),
        "weight.absmax": scales,
        "weight.quant_map": table.clone(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    return stored, (table[codes] * scales[:, None]).view(weight.shape)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("method", ["gptq", "nf4"])
@pytest.mark.parametrize("case", GPT_OSS)
def test_gpt_oss_one_by_one_quantized(
    case: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed matrices give the logits of the same numbers stored plainly, in each arrangement."""
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: (Reference(),))
    model = made("GptOss")
    plain = gpt_oss_one_by_one(model, *GPT_OSS[case])
    packed = dict(plain)
    for name in [name for name in plain if ".experts." in name and name.endswith(".weight")]:
        stored, plain[name] = (gptq if method == "gptq" else nf4)(packed.pop(name))
        packed |= {f"{name.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in stored.items()}
    config = FORMATS["gptq"][1] if method == "gptq" else NF4
    logits = []
    for folder, tensors, said in (("a", packed, config), ("b", plain, None)):
        (tmp_path / folder).mkdir()
        found = write(tmp_path / folder, model, tensors, said)
        loaded = load_model(open_checkpoint(str(found)), device="cpu", dtype="float32")
        logits += prompt_logits(loaded, [TOKENS])
    difference = differences(logits[0], logits[1])
    assert difference.max() <= 1e-4
