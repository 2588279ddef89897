"""Online quantization through load_model: tiny models against transformers on the same rounded weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model, plan_model
from lowbit.quantize.method import Module, build_method
from lowbit.quantize.recipe import Asked, Recipe, fused_name
from lowbit.quantize.specification import parse_method
from models.family_cases import SIZES as FAMILY_SIZES
from models.family_cases import saved

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
PROMPT = [3, 90, 17, 44, 5, 61, 22, 8, 8, 70]


def make(folder: Path, kind: type = LlamaForCausalLM, **changes: object) -> PreTrainedModel:
    """A random float32 checkpoint whose rows differ in size; every value is exact in bf16."""
    configs = {LlamaForCausalLM: LlamaConfig, MixtralForCausalLM: MixtralConfig}
    torch.manual_seed(11)
    model = kind(configs[kind](**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                rows = torch.linspace(0.02, 0.2, parameter.shape[-2]).unsqueeze(-1)
                parameter.copy_(torch.randn_like(parameter) * rows)
            parameter.copy_(parameter.bfloat16().float())
    model.save_pretrained(folder)
    return model


def rounded(weight: Tensor, method: str, name: str, largest: float = 0.0) -> Tensor:
    """The weight as the method leaves it, by the method itself: its numbers are tested elsewhere."""
    built = build_method(parse_method(method))
    module = Module(name, (weight.shape[0], weight.shape[1]), "f32", largest=largest)
    return built.quantize(weight, module, name).weight.dequantize()


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def oracle_logits(oracle: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return oracle(torch.tensor([PROMPT])).logits[0]


WEIGHTS_ONLY = (
    *("fp8:activation=none", "fp8:weights=tensor,activation=none", "fp8:weights=block,activation=none"),
    *(
        "w8a8_int8:activation=none",
        "mxfp8",
        "mxfp4",
        "nvfp4",
        "rtn",
        "int2",
        "int3:group_size=64",
        "int5",
        "int6",
    ),
    *("int8:symmetric=true,group_size=-1", "int4:symmetric=true"),
)


@pytest.fixture
def on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the reference kernel, which does not round inputs to bf16."""
    only = (Reference(),)
    monkeypatch.setattr("lowbit.kernels.linear_kernels", lambda: only)


@pytest.mark.usefixtures("on_the_reference")
@pytest.mark.parametrize("method", WEIGHTS_ONLY)
def test_logits_equal_transformers_on_the_rounded_weights(method: str, tmp_path: Path) -> None:
    oracle = make(tmp_path)
    linears = [(n, m) for n, m in oracle.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    largest: dict[str, float] = {}  # of all parts of a layer, for the outer scale of nvfp4
    for name, module in linears:
        layer = fused_name(name)
        largest[layer] = max(largest.get(layer, 0.0), float(module.weight.detach().abs().max()))
    for name, module in linears:
        module.weight.data = rounded(module.weight.data, method, name, largest[fused_name(name)])
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu", quantization=method)
    got, expected = prompt_logits(model, [PROMPT])[0], oracle_logits(oracle)
    assert distance(got, expected) <= 1e-5
    plain = prompt_logits(load_model(open_checkpoint(str(tmp_path)), device="cpu"), [PROMPT])[0]
    assert distance(expected, plain) > 0.005, "something was rounded"
    assert model.quantization == f"{method}, quantized at load"


@pytest.mark.usefixtures("on_the_reference")
@pytest.mark.parametrize(("method", "limit", "kind"), [("fp8", 448.0, "e4m3"), ("w8a8_int8", 127.0, "int8")])
def test_inputs_are_quantized_a_token(method: str, limit: float, kind: str, tmp_path: Path) -> None:
    oracle = make(tmp_path)

    def fake(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = arguments[0]
        scale = x.abs().amax(-1, keepdim=True) / limit
        steps = x / scale
        codes = steps.to(torch.float8_e4m3fn).float() if kind == "e4m3" else steps.round()
        return (codes * scale,)

    for name, module in oracle.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = rounded(module.weight.data, method, name)
            module.register_forward_pre_hook(fake)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu", quantization=method)
    got, expected = prompt_logits(model, [PROMPT])[0], oracle_logits(oracle)
    # A code on a border may fall to the other side after attention's rounding; most do not.
    assert distance(got, expected) <= 0.02


def test_experts_are_quantized_and_routers_are_not(tmp_path: Path) -> None:
    oracle = make(tmp_path, MixtralForCausalLM, num_local_experts=4, num_experts_per_tok=2)
    plan = plan_model(open_checkpoint(str(tmp_path)), quantization="int4:symmetric=true")
    schemes = {module.name: module for module in plan.modules}
    router = schemes["model.layers.0.mlp.gate"]
    assert router.scheme.is_dense and "never quantized" in router.reason
    experts = [module for name, module in schemes.items() if ".experts." in name]
    assert len(experts) == 2 * 4 * 3 and all(str(module.scheme) == "int4 1x128 f16" for module in experts[:2])
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                for expert in parameter:
                    expert.copy_(rounded(expert.clone(), "int4:symmetric=true", name))
            elif name.endswith("_proj.weight"):
                parameter.copy_(rounded(parameter.clone(), "int4:symmetric=true", name))
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu", quantization="int4:symmetric=true")
    assert distance(prompt_logits(model, [PROMPT])[0], oracle_logits(oracle)) <= 0.05


def test_a_recipe_and_an_ignore_list(tmp_path: Path) -> None:
    make(tmp_path / "model")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'default = "fp8"\n[[rule]]\nmodules = "attention"\nquantization = "int8"\n'
        '[[rule]]\nmodules = ["head", "embedding"]\nquantization = "rtn"\nbits = 4\ngroup_size = 32\n'
    )
    asked = Asked(recipe_file=str(recipe), ignore="layers.1.mlp, *.o_proj")
    plan = plan_model(open_checkpoint(str(tmp_path / "model")), quantization=asked)
    schemes = {module.name: str(module.scheme) for module in plan.modules}
    assert schemes["model.layers.0.self_attn.q_proj"] == "uint8 1x128 f16 asym"
    assert schemes["model.layers.0.self_attn.o_proj"] == "f32"
    assert schemes["model.layers.0.mlp.up_proj"] == "e4m3 1xall f32 (input e4m3 1xall dynamic)"
    assert schemes["model.layers.1.mlp.up_proj"] == "f32"
    assert schemes["lm_head"] == schemes["model.embed_tokens"] == "uint4 1x32 f16 asym"
    reasons = {module.name: module.reason for module in plan.modules}
    assert reasons["model.layers.0.self_attn.o_proj"] == "--quantization-ignore *.o_proj"
    model = load_model(open_checkpoint(str(tmp_path / "model")), device="cpu", quantization=asked)
    assert prompt_logits(model, [PROMPT])[0].isfinite().all()
    assert model.quantization == "recipe recipe.toml, quantized at load"
    assert model.weight_bytes == pytest.approx(plan.weight_bytes, rel=0.02)


def test_a_tied_head_follows_the_embedding(tmp_path: Path) -> None:
    oracle = make(tmp_path, tie_word_embeddings=True)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmodules = "embedding"\nquantization = "w8a8_int8"\n')
    oracle.model.embed_tokens.weight.data = rounded(
        oracle.model.embed_tokens.weight.data, "w8a8_int8", "model.embed_tokens"
    )
    model = load_model(
        open_checkpoint(str(tmp_path)), device="cpu", quantization=Asked(recipe_file=str(recipe))
    )
    assert distance(prompt_logits(model, [PROMPT])[0], oracle_logits(oracle)) <= 0.02


def test_layers_that_cannot_take_a_method(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, intermediate_size=208)  # 208 % 64 != 0
    header = open_checkpoint(str(tmp_path))
    plan = plan_model(header, quantization="rtn:group_size=64")
    kept = {module.name for module in plan.modules if module.scheme.is_dense and "layers" in module.name}
    assert kept == {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)}
    with caplog.at_level(logging.INFO, "lowbit"):
        load_model(header, device="cpu", quantization="rtn:group_size=64")
    assert "layers.*.mlp.down_proj stays f32: rtn:group_size=64: group size 64 does not divide" in caplog.text
    assert "16 would" in caplog.text and "(2 layers)" in caplog.text
    with pytest.raises(LowbitError, match="down_proj: rtn:group_size=64: group size 64") as caught:
        load_model(header, device="cpu", quantization="rtn:group_size=64", strict=True)
    assert caught.value.code == "E0403"


def test_a_quantized_checkpoint_refuses_every_flag(tmp_path: Path) -> None:
    make(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale"] = torch.ones(())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('default = "fp8"')
    flags = (Asked("int4"), Asked(torchao_config="int8wo"), Asked(recipe_file=str(recipe)))
    for asked in (*flags, Asked(gguf_type="q4_0"), Asked(ignore="head")):
        with pytest.raises(LowbitError, match="already quantized .fp8") as caught:
            load_model(open_checkpoint(str(tmp_path)), quantization=asked)
        assert caught.value.code == "E0401" and f"drop {asked.flag.split()[0]}," in caught.value.message


def test_gguf_mixes_know_gate_and_up_of_shared_experts(tmp_path: Path) -> None:
    """Granite keeps them in one matrix, GGUF apart: it has no name for the whole."""
    granite = {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 64}
    saved("GraniteMoeShared", tmp_path, **FAMILY_SIZES | granite)
    plan = plan_model(open_checkpoint(str(tmp_path)), quantization="gguf:type=q8_0")
    schemes = {module.name: str(module.scheme) for module in plan.modules}
    assert schemes["model.layers.0.mlp.shared_experts.gate_up_proj"] == "q8_0"


def test_inspect_estimates_the_error_from_the_weights(tmp_path: Path) -> None:
    oracle = make(tmp_path)
    plan = plan_model(open_checkpoint(str(tmp_path)), quantization="int4")
    weight = oracle.model.layers[1].mlp.down_proj.weight.data[:128]
    expected = (rounded(weight, "int4", "x") - weight).norm() / weight.norm()
    [module] = [m for m in plan.modules if m.name == "model.layers.1.mlp.down_proj"]
    assert module.error == pytest.approx(float(expected), rel=1e-5)
    assert module.nbytes == round(128 * 192 * (4 + (16 + 4) / 64) / 8)  # groups of 64 divide 192
    assert plan.described == "int4, quantized at load"


def test_recipes_use_each_method_once() -> None:
    recipe = Recipe.of(parse_method("fp8:weights=block"))
    assert [method.text for method in recipe.methods] == ["fp8:weights=block"]


def test_delayed_scales_are_kept_between_runs_and_serve_as_static_ones(tmp_path: Path) -> None:
    make(tmp_path / "model")
    header, file = open_checkpoint(str(tmp_path / "model")), tmp_path / "states.safetensors"
    delayed = f"fp8:activation=delayed,history=4,scales={file}"
    first = load_model(header, device="cpu", quantization=delayed)
    fresh = first.states.state_dict()
    assert set(fresh) == {
        f"model.layers.{n}.{layer}.{kind}"
        for n in (0, 1)
        for layer in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        for kind in ("scale", "amax_history")
    }
    for _ in range(3):
        prompt_logits(first, [PROMPT])
    first.states.keep()
    second = load_model(header, device="cpu", quantization=delayed)
    kept = second.states.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in first.states.state_dict().items())
    assert any(not torch.equal(kept[name], fresh[name]) for name in kept if name.endswith("scale"))
    expected = prompt_logits(second, [PROMPT])[0]

    static = load_model(header, device="cpu", quantization=f"fp8:activation=static,scales={file}")
    assert torch.equal(prompt_logits(static, [PROMPT])[0], expected), (
        "the step that follows uses these scales"
    )
    longer = f"fp8:activation=delayed,history=8,scales={file}"
    with pytest.raises(LowbitError, match="states.safetensors") as caught:
        load_model(header, device="cpu", quantization=longer)
    assert caught.value.code == "E0706"


def test_static_scales_from_a_file(tmp_path: Path) -> None:
    make(tmp_path / "model")
    header, file = open_checkpoint(str(tmp_path / "model")), tmp_path / "scales.safetensors"
    method = f"fp8:activation=static,scales={file}"
    with pytest.raises(LowbitError, match="scales.safetensors"):
        load_model(header, quantization=method)
    with pytest.raises(LowbitError, match="needs scales=FILE"):
        load_model(header, quantization="fp8:activation=static")
    save_file({"model.layers.0.mlp.up_proj.input_scale": torch.tensor(0.01)}, file)
    reasons = {module.name: module.reason for module in plan_model(header, quantization=method).modules}
    assert reasons["model.layers.0.mlp.up_proj"] == ""
    assert "has no model.layers.0.mlp.gate_proj.input_scale" in reasons["model.layers.0.mlp.gate_proj"]
    save_file({"model.layers.0.mlp.up_proj.input_scale": torch.tensor(0.0)}, file)
    with pytest.raises(LowbitError, match="must be one positive number") as caught:
        load_model(header, quantization=method)
    assert caught.value.code == "E0215"
