"""Qwen3-Next and Qwen3.5 that two ranks share, beside the same model in one process: heads that divide and
that do not, fused projections in every order and kind of scheme they are stored in, and what a rank reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.hqq_columns import by_columns
from loading.test_tensor_parallel import PROMPTS, check, ranks, with_act_order
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels.parallel import Parallel
from lowbit.kernels.recurrent import StateSpec
from lowbit.loading import load_model, plan_model
from lowbit.loading.opened import Opened
from lowbit.loading.quantizing import quantized_checkpoint
from lowbit.models.mixer_model import MixerModel
from lowbit.models.qwen_next import DeltaNet, GatedAttention
from lowbit.quantize.recipe import Asked
from models.family_cases import write_checkpoint
from models.test_gguf_families import FOLDER
from models.test_qwen_next import make_checkpoint
from models.test_qwen_next_gguf import rewritten
from parallel_ranks import Job, Ranks

__all__ = ["ranks"]

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mlp_only_layers": [],
}
DENSE = {**SIZES, "num_experts": 0}
THREE = {"linear_num_key_heads": 3, "linear_num_value_heads": 6}
INSIDE = {"linear_value_head_dim": 48}  # two heads of it are not whole groups of 64


def made(folder: Path, **sizes: Any) -> Path:
    make_checkpoint(folder, **sizes)
    return folder


def quantized(folder: Path, method: str, **sizes: Any) -> Path:
    """A model of these sizes quantized and saved; rows lie as the model's own checkpoint has them."""
    source = open_checkpoint(str(made(folder / "float", **sizes)))
    quantized_checkpoint(Opened.of(source, Asked(method), False), save=folder / "small")
    return folder / "small"


def by_hand(folder: Path, quantize: Callable[..., Any], config: dict[str, Any]) -> Path:
    """The projections of a dense model as ``quantize`` stores them; b and a stay plain."""
    model = make_checkpoint(folder / "float", **DENSE)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "float" / "model.safetensors").items():
        if not any(leaf in name for leaf in ("_proj.weight", "qkvz.weight")):
            stored[name] = tensor
            continue
        state, _ = quantize(tensor)
        stored |= {f"{name.removesuffix('weight')}{suffix}": part for suffix, part in state.items()}
    told = {**model.config.to_dict(), "architectures": ["Qwen3NextForCausalLM"]}
    write_checkpoint(folder / "small", {**told, "quantization_config": config}, stored)
    return folder / "small"


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}
HQQ = {
    "quant_method": "hqq",
    "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 32, "axis": 0}},
    "skip_modules": ["lm_head", "in_proj_ba"],
}
CASES: dict[str, Callable[[Path], Path]] = {
    "as published": made,
    "three key heads": partial(made, **SIZES | THREE),
    "one key head on both ranks": partial(made, linear_num_key_heads=1, num_key_value_heads=1),
    "biases, tied, dense": partial(made, **DENSE, attention_bias=True, tie_word_embeddings=True),
    "int4 in groups": partial(quantized, method="int4:group_size=32", **SIZES),
    "int4, heads end inside groups": partial(quantized, method="int4:group_size=64", **SIZES | INSIDE),
    "int8 blocks of rows": partial(quantized, method="blockwise_int8", **SIZES),
    "nf4": partial(quantized, method="nf4", **SIZES),
    "int8 inputs by token": partial(quantized, method="w8a8_int8", **SIZES),
    "act-order": partial(by_hand, quantize=with_act_order, config=GPTQ),
    "scales of columns": partial(by_hand, quantize=lambda weight: by_columns(weight, 32), config=HQQ),
    "Qwen3.5": partial(made, kind="Qwen3_5", **SIZES | THREE),
    "Qwen3.5 with experts": partial(made, kind="Qwen3_5Moe", **SIZES),
    "Qwen3.5, int4 in groups": partial(quantized, method="int4:group_size=32", kind="Qwen3_5", **SIZES),
    "GGUF": lambda folder: FOLDER / "qwen3next.gguf",
    "GGUF, fused as it was": lambda folder: rewritten(folder / "m.gguf", fused=True),
}
ROUNDED = ("int8 blocks of rows", "int8 inputs by token")  # codes of inputs may tip


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_one_process(ranks: Ranks, case: str, tmp_path: Path) -> None:
    path = CASES[case](tmp_path)
    one, both = check(ranks, Job(path, PROMPTS))
    assert sum(rank.weight_bytes for rank in both) <= 1.3 * one.weight_bytes
    check(ranks, Job(path, PROMPTS, reference=False), 0.05 if case in ROUNDED else 0.01)


# Codes of fp8 inputs may tip, as the order of sums is each processor's.
@pytest.mark.parametrize(("method", "limit"), [("fp8", 0.02), ("int8:group_size=32", 1e-5)])
def test_quantized_at_load(ranks: Ranks, method: str, limit: float, tmp_path: Path) -> None:
    path = made(tmp_path, **SIZES | THREE)
    check(ranks, Job(path, PROMPTS, options={"quantization": Asked(method)}), limit)


def test_runs_have_the_same_bits(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(quantized(tmp_path, "blockwise_int8", **SIZES), PROMPTS, reference=False)
    first, second = ranks.run(job)[0], ranks.run(job)[0]
    assert all(torch.equal(*pair) for pair in zip(first.logits, second.logits, strict=True))


def test_the_plan_says_what_is_cut(tmp_path: Path) -> None:
    def cuts(path: Path) -> dict[str, str]:
        plan = plan_model(open_checkpoint(str(path)), tp_size=2)
        return {module.name.rpartition(".")[2]: module.cut for module in plan.modules}

    found = cuts(made(tmp_path / "float", **SIZES | THREE))
    assert found["in_proj_qkvz"] == "rows 64 | 32 + 256 | 128" and found["in_proj_ba"] == "rows 4 | 2"
    assert found["out_proj"] == "columns 256 | 128" and found["q_proj"] == "rows 128 | 128"
    found = cuts(quantized(tmp_path / "blocks", "blockwise_int8", **SIZES))
    assert found["in_proj_qkvz"] == "rows 32 | 32 + 128 | 128, as stored, results put in order"
    assert found["out_proj"] == "columns 128 | 128 in groups of 128"
    found = cuts(quantized(tmp_path / "inside", "int4:group_size=64", **SIZES | INSIDE))
    assert found["out_proj"] == "columns 128 | 64 in groups of 64, inputs gathered (heads end inside groups)"
    plan = plan_model(open_checkpoint(str(made(tmp_path / "one", linear_num_key_heads=1))), tp_size=2)
    [first, *_] = [spec for spec in plan.cache_specs if isinstance(spec, StateSpec)]
    assert first == StateSpec(k_heads=1, heads=3, k_dim=24, v_dim=80, taps=4)


def test_a_size_that_heads_do_not_have_is_named(tmp_path: Path) -> None:
    header = open_checkpoint(str(made(tmp_path, num_key_value_heads=4)))
    wanted = "--tp-size 3: 6 value heads with 2 key heads of linear attention .* what works: 1, 2, 4, 6"
    with pytest.raises(LowbitError, match=wanted) as caught:
        plan_model(header, tp_size=3)
    assert caught.value.code == "E0430"


def test_a_rank_reads_and_keeps_its_own_heads_only(tmp_path: Path) -> None:
    """What belongs to the other rank is damaged: nothing of it is seen."""
    path = made(tmp_path, **DENSE | THREE)
    header = open_checkpoint(str(path))
    whole = load_model(header, device="cpu", parallel=Parallel(1, 2))
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "in_proj_qkvz" in name or "in_proj_ba" in name:
            tensor[: 2 * len(tensor) // 3] = torch.nan  # of key heads 0 and 1
        elif "out_proj" in name:
            tensor[:, : 2 * tensor.shape[1] // 3] = torch.nan
        elif "conv1d" in name:
            tensor[:64], tensor[96:160], tensor[192 : 192 + 256] = torch.nan, torch.nan, torch.nan
        elif "A_log" in name or "dt_bias" in name:
            tensor[:4] = torch.nan
        elif "o_proj" in name:
            tensor[:, : tensor.shape[1] // 2] = torch.nan
        elif any(leaf in name for leaf in ("q_proj", "k_proj", "v_proj")):
            tensor[: len(tensor) // 2] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    damaged = load_model(open_checkpoint(str(path)), device="cpu", parallel=Parallel(1, 2))
    assert isinstance(whole, MixerModel) and isinstance(damaged, MixerModel)
    for one, other in zip(whole.blocks, damaged.blocks, strict=True):
        assert isinstance(one.mixer, (DeltaNet, GatedAttention))
        assert isinstance(other.mixer, type(one.mixer))
        for layer in ("inner", "output"):
            pair = [getattr(block.mixer, layer).weights[0].buffers["data"] for block in (one, other)]
            assert torch.equal(*pair)
    net, again = whole.blocks[0].mixer, damaged.blocks[0].mixer
    assert isinstance(net, DeltaNet) and isinstance(again, DeltaNet)
    assert net.spec == StateSpec(k_heads=1, heads=2, k_dim=32, v_dim=64, taps=4)
    for name in ("taps", "decay", "bias"):
        assert torch.equal(getattr(net.weights, name), getattr(again.weights, name))
