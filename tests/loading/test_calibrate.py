"""The walk over a model's blocks: what it sees, what it gives, what it keeps in memory; and that it helps."""

from __future__ import annotations

import gc
import itertools
import logging
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.loading import calibrate as walk
from lowbit.loading import load_model, plan_model
from lowbit.loading.calibrate import Calibrated, calibrate, quantized_model
from lowbit.models.model import Model
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import dense
from lowbit.quantize import block as block_module
from lowbit.quantize.calibration import CalibratedModule, CalibrationOptions, ChangedVector
from lowbit.quantize.integer_grid import IntegerGrid, round_to_nearest

FIXTURES = Path(__file__).parents[1] / "fixtures"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, object]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Qwen2": {},
    "Phi3": {"sliding_window": None},
    "Gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 48},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 30},
}


# Norms elsewhere, with biases, or one for both halves of a block; experts beside a shared one with a gate.
OTHERS: dict[str, dict[str, object]] = {
    "Olmo2": {},
    "StableLm": {"use_qkv_bias": True},
    "Cohere": {"use_qk_norm": True},
    "Nemotron": {},
    "MiniMaxM2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "Granite": {"residual_multiplier": 0.4, "embedding_multiplier": 3.0},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
}


def make_checkpoint(family: str, folder: Path) -> transformers.PreTrainedModel:
    """Random weights, but as trained ones are: embeddings of low rank, and a few loud channels."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**SIZES | (FAMILIES | OTHERS)[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.3, 0.6)
                parameter[..., torch.randperm(parameter.shape[-1])[:4]] *= 8
            elif "embed" in name:
                basis = torch.randn(12, parameter.shape[1])
                parameter.copy_(torch.randn(len(parameter), 12) @ basis * 0.3)
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter.normal_(0, 0.12)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CheckpointHeader]:
    found = {}
    for family in (*FAMILIES, *OTHERS):
        folder = tmp_path_factory.mktemp(family)
        make_checkpoint(family, folder)
        found[family] = open_checkpoint(str(folder))
    return found


def text(seed: int, count: int = 16, length: int = 64) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 131, (count, length), generator=generator).tolist()


def options(method: str, **changes: object) -> CalibrationOptions:
    symmetric = method != "awq"
    return CalibrationOptions(**{"method": method, "symmetric": symmetric, "group_size": 32, **changes})


def divergence(header: CheckpointHeader, model: Model) -> float:
    """Mean KL to the float model on text that calibration has not seen."""
    prompts = text(99, 3)
    wanted = torch.cat(prompt_logits(load_model(header, device="cpu"), prompts)).log_softmax(-1)
    found = torch.cat(prompt_logits(model, prompts)).log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def modules(stream: list[Calibrated]) -> dict[str, QuantizedTensor]:
    return {found.name: found.weight for found in stream if isinstance(found, CalibratedModule)}


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mixtral"])
@pytest.mark.parametrize(("method", "at_most"), [("gptq", 0.4), ("awq", 0.85)])
def test_calibrated_is_closer_to_the_float_model_than_rounded(
    family: str, method: str, at_most: float, checkpoints: dict[str, CheckpointHeader]
) -> None:
    header = checkpoints[family]
    symmetric = options(method).symmetric
    rounded = quantized_model(
        header, calibrate(header, [], options("rtn", symmetric=symmetric)), device="cpu"
    )
    found = quantized_model(header, calibrate(header, text(1), options(method, scale_steps=10)), device="cpu")
    assert divergence(header, found) < at_most * divergence(header, rounded)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_linear_of_every_block_is_quantized_once(
    family: str, method: str, checkpoints: dict[str, CheckpointHeader]
) -> None:
    header = checkpoints[family]
    stream = list(calibrate(header, text(1, 2), options(method, scale_steps=2, clip_steps=1)))
    expected: Counter[str] = Counter()
    routers = {"Mixtral": ".mlp.gate", "Qwen3Moe": ".mlp.gate", "GptOss": ".mlp.router"}
    for planned in plan_model(header).modules:
        if ".layers." not in planned.name or planned.name.endswith(routers.get(family, "none")):
            continue
        if ".experts." in planned.name and planned.name.endswith("gate_up_proj"):
            stem = planned.name.removesuffix("gate_up_proj")
            expected.update([f"{stem}gate_proj", f"{stem}up_proj"])
        else:
            expected[planned.name] += 1
    quantized = [f for f in stream if isinstance(f, CalibratedModule) and not f.weight.scheme.is_dense]
    assert Counter(found.name for found in quantized) == expected and set(expected.values()) == {1}
    assert all(str(found.weight.scheme.weight.name) in ("int4", "uint4") for found in quantized)
    others = [found.name for found in stream if found not in quantized]
    if method == "gptq":
        assert not others
    else:
        vectors = [name for name in others if name.endswith("norm.weight")]
        assert len(vectors) == 4 and len(set(others)) == len(others)
        assert len(others) - len(vectors) == (2 if family in routers else 0)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_folding_scales_changes_no_logit(
    family: str, checkpoints: dict[str, CheckpointHeader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWQ with everything but the rounding: the model is the one it was."""

    def unrounded(linear: block_module.FloatLinear, _: CalibrationOptions) -> QuantizedTensor:
        return QuantizedTensor(dense("f32"), tuple(linear.weight.shape), linear.weight.clone())

    monkeypatch.setattr(block_module, "_quantize", unrounded)
    header = checkpoints[family]
    stream = list(calibrate(header, text(1, 2), options("awq", bits=3, scale_steps=4)))
    changed = [found for found in stream if isinstance(found, ChangedVector)]
    # OLMo 2 has no norm whose weight could take a scale over.
    assert changed or family == "Olmo2", "a fold that does nothing proves nothing"
    before = prompt_logits(load_model(header, device="cpu"), text(7, 1))[0]
    after = prompt_logits(quantized_model(header, stream, device="cpu"), text(7, 1))[0]
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Qwen2Moe"])
@pytest.mark.parametrize("kept", ["qkv?_proj", "(gate|up|gate_up)_proj"])
def test_what_stays_float_follows_the_scales_of_what_it_feeds(
    kept: str, family: str, checkpoints: dict[str, CheckpointHeader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """V and up give their rows' scales away whether or not they are quantized themselves."""
    folded = []
    apply = block_module.apply_fold

    def recorded(block: block_module.FloatBlock, fold: block_module.Fold, scales: Tensor) -> None:
        folded.append(fold.producer)
        apply(block, fold, scales)

    def unrounded(linear: block_module.FloatLinear, _: CalibrationOptions) -> QuantizedTensor:
        return QuantizedTensor(dense("f32"), tuple(linear.weight.shape), linear.weight.clone())

    def keep(name: str) -> bool:
        return re.search(rf"\.({kept.replace('qkv?', '([qkv]|qkv)')})$", name) is not None

    monkeypatch.setattr(block_module, "apply_fold", recorded)
    monkeypatch.setattr(block_module, "_quantize", unrounded)
    header = checkpoints[family]
    stream = list(calibrate(header, text(1, 2), options("awq", bits=3, scale_steps=4), keep=keep))
    assert any("qkv" in name if "qkv" in kept else "gate_up" in name for name in folded)
    before = prompt_logits(load_model(header, device="cpu"), text(7, 1))[0]
    after = prompt_logits(quantized_model(header, stream, device="cpu"), text(7, 1))[0]
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_a_half_kept_layer_is_refused_before_any_work(
    checkpoints: dict[str, CheckpointHeader],
) -> None:
    """The last block's, too: nothing of the stream was asked for yet."""
    with pytest.raises(
        LowbitError, match=r"layers\.1\.self_attn\.q_proj is to be quantized otherwise"
    ) as caught:
        calibrate(
            checkpoints["Llama"], text(1), options("gptq"), keep=lambda name: "1.self_attn.q_proj" in name
        )
    assert caught.value.code == "E0405"


def test_every_kind_of_fold_takes_place(
    checkpoints: dict[str, CheckpointHeader], monkeypatch: pytest.MonkeyPatch
) -> None:
    folded: set[tuple[str, str]] = set()
    apply = block_module.apply_fold

    def recorded(block: block_module.FloatBlock, fold: block_module.Fold, scales: Tensor) -> None:
        folded.add((fold.producer.split(".", 3)[3], fold.consumers[-1].split(".", 3)[3]))
        apply(block, fold, scales)

    monkeypatch.setattr(block_module, "apply_fold", recorded)
    for family in ("Llama", "Mixtral", "StableLm", "Cohere", "Qwen2Moe"):
        list(calibrate(checkpoints[family], text(1, 4), options("awq", scale_steps=4, clip_steps=1)))
    assert {
        ("input_layernorm.weight", "self_attn.qkv_proj"),
        ("self_attn.qkv_proj", "self_attn.o_proj"),
        ("post_attention_layernorm.weight", "mlp.gate_up_proj"),
        ("mlp.gate_up_proj", "mlp.down_proj"),
        ("post_attention_layernorm.weight", "mlp.experts.3.gate_up_proj"),
        ("mlp.experts.2.gate_up_proj", "mlp.experts.2.down_proj"),
        ("mlp.shared_expert.gate_up_proj", "mlp.shared_expert.down_proj"),
        ("input_layernorm.weight", "mlp.gate_up_proj"),
    } <= folded


def test_hessians_are_those_of_transformers_behind_quantized_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each Linear sees what the quantized ones before it give; sequences of any length."""
    oracle = make_checkpoint("Llama", tmp_path)
    seen: dict[str, Tensor] = {}
    real = block_module.gptq

    def recorded(weight: Tensor, hessian: Tensor, **rest: object) -> QuantizedTensor:
        seen[str(rest["origin"]).removeprefix("model.layers.")] = hessian.clone()
        return real(weight, hessian, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(block_module, "gptq", recorded)
    monkeypatch.setattr(walk, "CHUNK_TOKENS", 100)
    sequences = [*text(1, 2, 70), *text(2, 3, 17), *text(3, 1, 100), *text(4, 2, 1)]
    found = modules(list(calibrate(open_checkpoint(str(tmp_path)), sequences, options("gptq", bits=3))))
    expected: dict[str, Tensor] = {}

    def watch(name: str) -> object:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].flatten(0, -2)
            expected[name] = expected.get(name, 0) + x.T @ x

        return hook

    fused = {"q_proj": "qkv_proj", "o_proj": "o_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
    stages = ({"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"})
    for layer, stage in itertools.product(range(2), stages):
        linears = {
            name: linear
            for name, linear in oracle.model.layers[layer].named_modules()
            if name.rpartition(".")[2] in stage
        }
        hooks = []
        for name, linear in linears.items():
            stem, _, leaf = name.rpartition(".")
            if leaf in fused:
                hooks.append(linear.register_forward_pre_hook(watch(f"{layer}.{stem}.{fused[leaf]}")))
        with torch.no_grad():
            for sequence in sequences:
                oracle(torch.tensor([sequence]))
            for name, linear in linears.items():
                linear.weight.copy_(found[f"model.layers.{layer}.{name}"].dequantize())
        for hook in hooks:
            hook.remove()
    assert seen.keys() == expected.keys() and len(seen) == 8
    for name, hessian in seen.items():
        assert (hessian - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_same_text_gives_the_same_codes_and_another_others(
    method: str, checkpoints: dict[str, CheckpointHeader]
) -> None:
    header = checkpoints["Llama"]
    first, again, other = (
        modules(list(calibrate(header, text(n, 4), options(method, scale_steps=4)))) for n in (1, 1, 2)
    )
    assert all(torch.equal(first[name].codes, again[name].codes) for name in first)
    assert all(torch.equal(first[name].scales[0], again[name].scales[0]) for name in first)
    assert all(not torch.equal(first[name].codes, other[name].codes) for name in first)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_float_weights_of_earlier_blocks_are_gone(
    method: str, family: str, checkpoints: dict[str, CheckpointHeader], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[tuple[int, weakref.ref[Tensor]]] = []
    load = walk.HeldLinear.load

    def recorded(self: walk.HeldLinear) -> block_module.FloatLinear:
        held = load(self)
        alive.append((int(self.name.split(".")[2]), weakref.ref(held.weight)))
        return held

    monkeypatch.setattr(walk.HeldLinear, "load", recorded)
    stream = calibrate(checkpoints[family], text(1, 2), options(method, scale_steps=2, clip_steps=2))
    assert not alive, "nothing is read before somebody asks"
    blocks = set()
    for found in stream:
        block = int(found.name.split(".")[2])
        if block not in blocks:
            gc.collect()
        blocks.add(block)
        assert all(reference() is None for layer, reference in alive if layer < block), found.name
        assert all(layer <= block for layer, _ in alive), "a block is read when its turn comes"
    gc.collect()
    assert blocks == {0, 1} and all(reference() is None for _, reference in alive)


def test_experts_that_saw_too_little_are_rounded_and_named(
    checkpoints: dict[str, CheckpointHeader], caplog: pytest.LogCaptureFixture
) -> None:
    header = checkpoints["Mixtral"]
    with caplog.at_level(logging.WARNING, "lowbit"):
        found = modules(list(calibrate(header, text(1, 1, 40), options("gptq", minimum_tokens=20))))
    plain = modules(list(calibrate(header, [], options("rtn"))))
    named = {message.split()[1] for message in caplog.messages}
    assert named and all(".experts." in name for name in named)
    for name, weight in found.items():
        stem, _, leaf = name.rpartition(".")
        linear = f"{stem}.{'gate_up_proj' if leaf in ('gate_proj', 'up_proj') else leaf}"
        assert torch.equal(weight.codes, plain[name].codes) == (linear in named), name


def test_rounding_needs_no_text(checkpoints: dict[str, CheckpointHeader]) -> None:
    header = checkpoints["Qwen2"]
    stream = list(calibrate(header, [], options("rtn", bits=8, group_size=None)))
    found = modules(stream)["model.layers.1.mlp.down_proj"]
    weight = (
        transformers.AutoModelForCausalLM.from_pretrained(header.root).model.layers[1].mlp.down_proj.weight
    )
    expected = round_to_nearest(weight.detach().float(), IntegerGrid(8, True), 32)
    assert torch.equal(found.codes, expected.codes) and found.scheme == expected.scheme
    biases = [f for f in stream if isinstance(f, CalibratedModule) and f.bias is not None]
    assert {found.name.split(".")[-1] for found in biases} == {"q_proj", "k_proj", "v_proj"}
    assert divergence(header, quantized_model(header, stream, device="cpu")) < 1e-3


def test_act_order_with_moving_groups_runs(checkpoints: dict[str, CheckpointHeader]) -> None:
    """Q, K and V share one column order, so they are still one product."""
    header = checkpoints["Qwen2"]
    stream = list(calibrate(header, text(1, 8), options("gptq", static_groups=False)))
    assert all(weight.scheme.reordered for weight in modules(stream).values())
    model = quantized_model(header, stream, device="cpu")
    assert len(model.blocks[0].qkv.weights) == 1
    assert divergence(header, model) < 0.03


def test_progress_goes_block_by_block(checkpoints: dict[str, CheckpointHeader]) -> None:
    told: list[tuple[int, int, str]] = []
    list(calibrate(checkpoints["Llama"], [], options("rtn"), on_progress=lambda *now: told.append(now)))
    assert told == [
        (0, 2, "model.layers.0"),
        (1, 2, "model.layers.1"),
        (2, 2, "rtn: all blocks"),
    ]


def test_a_stream_of_another_model_is_refused(checkpoints: dict[str, CheckpointHeader]) -> None:
    stream: Iterator[Calibrated] = calibrate(checkpoints["Mixtral"], [], options("rtn"))
    with pytest.raises(LowbitError, match=r"experts\.0\.") as caught:
        quantized_model(checkpoints["Llama"], [f for f in stream if ".experts." in f.name])
    assert caught.value.code == "E0217"


@pytest.mark.parametrize("sequence", [[1, 131], [-1], [], [5] * 257])
def test_text_that_does_not_fit_the_model(
    sequence: list[int], checkpoints: dict[str, CheckpointHeader]
) -> None:
    with pytest.raises(LowbitError) as caught:
        calibrate(checkpoints["Llama"], [[1, 2], sequence], options("gptq"))
    assert caught.value.code == "E0441"


def test_no_text_at_all(checkpoints: dict[str, CheckpointHeader]) -> None:
    with pytest.raises(LowbitError, match="no calibration text") as caught:
        calibrate(checkpoints["Llama"], [], options("awq"))
    assert caught.value.code == "E0441"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_inputs_that_are_not_numbers_name_the_layer(method: str, tmp_path: Path) -> None:
    make_checkpoint("Llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.input_layernorm.weight"][5] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LowbitError, match=r"model\.layers\.1\.self_attn\.qkv_proj") as caught:
        list(calibrate(open_checkpoint(str(tmp_path)), text(1, 2), options(method, scale_steps=2)))
    assert caught.value.code == "E0442"


def test_quantized_checkpoints_only_on_request() -> None:
    header = open_checkpoint(str(FIXTURES / "gptq" / "w4_sym"))
    with pytest.raises(LowbitError, match=r"quantized already \(int4") as caught:
        calibrate(header, [], options("rtn"))
    assert caught.value.code == "E0401"
    stream = list(calibrate(header, [], options("rtn", bits=8, requantize=True)))
    before = prompt_logits(load_model(header, device="cpu"), [[1, 2, 3]])[0]
    after = prompt_logits(quantized_model(header, stream, device="cpu"), [[1, 2, 3]])[0]
    assert (after - before).abs().max() < 0.05 * before.abs().max()


def test_deepseek_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = transformers.DeepseekV2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        vocab_size=64,
    )
    transformers.DeepseekV2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(LowbitError, match="Deepseek") as caught:
        calibrate(open_checkpoint(str(tmp_path)), [[1, 2]], options("awq"))
    assert caught.value.code == "E0440"
