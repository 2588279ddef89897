"""BitNet: transformers' own values and layers, and configs and tensors that contradict each other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats.helpers import check_values, fixture_cases, header_of, read, reader_of
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.formats.bitnet import rounded
from lowbit.kernels.activation_quant import InputTransform
from lowbit.loading import load_model, plan_model

CASES = fixture_cases("bitnet")
NAME = "model.layers.0.self_attn.q_proj"
SHAPE = (32, 32)
INPUT = "(input int8 1xall dynamic)"


def case(name: str) -> Path:
    return next(path for path in CASES if path.name == name)


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_the_tools_own_values(folder: Path) -> None:
    check_values(folder)


def test_what_the_cases_cover() -> None:
    found = {path.name: str(read(path, NAME, SHAPE).weight.scheme) for path in CASES}
    assert found == {
        "bitlinear": f"ternary allxall f32 {INPUT}",
        "autobitlinear": f"ternary allxall bf16 {INPUT}",
        "unpacked": f"ternary allxall bf16 {INPUT}",
        "online": f"ternary allxall bf16 {INPUT}",
        "biases": f"ternary allxall f32 {INPUT}",
    }


def test_the_tools_own_logits() -> None:
    """AutoBitLinear multiplies biases with its scale, too."""
    wanted = load_file(case("biases") / "outputs.safetensors")["logits"]
    tokens = [[1, 5, 9, 3, 7, 2, 0, 14, 8, 8, 4]]
    for options in ({"linear_kernel": "reference", "dtype": "float32"}, {}):
        model = load_model(header_of(case("biases")), device="cpu", kv_cache_dtype="f32", **options)
        assert (prompt_logits(model, tokens)[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_heads_tied_to_the_embedding(tmp_path: Path) -> None:
    """transformers rounds such a head at run time unless the list has it."""
    seed = Seed.of(case("online"))
    plain = {name: tensor for name, tensor in seed.tensors.items() if name != "lm_head.weight"}
    for number, kept in enumerate((None, ["head"], ["gate_proj"])):
        config = copy.deepcopy(seed.config) | {"tie_word_embeddings": True}
        config["quantization_config"]["modules_to_not_convert"] = kept
        header = open_checkpoint(str(seed.write(tmp_path / str(number), config, plain)))
        if kept != ["gate_proj"]:
            assert plan_model(header, device="cpu").modules
            continue
        with pytest.raises(LowbitError, match="leaves out lm_head, which is tied") as raised:
            plan_model(header, device="cpu")
        assert raised.value.code == "E0218"


@pytest.mark.parametrize("name", ["bitlinear", "unpacked", "online"])
def test_routers(name: str, tmp_path: Path) -> None:
    """To transformers 5 they are no Linears; a version that had converted one stored its scale."""
    plain, converted = "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"
    tensors = {f"{plain}.weight": torch.ones(4, 32)}
    if name != "online":
        tensors |= {f"{converted}.weight": torch.zeros(1, 32, dtype=torch.uint8)}
        tensors |= {f"{converted}.weight_scale": torch.ones(1)}
    folder = changed(name, tmp_path, tensors)
    assert read(folder, plain, (4, 32)).weight.scheme.is_dense
    if name != "online":
        assert str(read(folder, converted, (4, 32)).weight.scheme) == f"ternary allxall f32 {INPUT}"


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_every_tensor_has_a_use(folder: Path) -> None:
    used = set(reader_of(folder).tensors_of(StoredModule(NAME, NAME, SHAPE)))
    assert used == {name for name in header_of(folder).tensors if name.startswith(f"{NAME}.")}
    plan = {module.name: module for module in plan_model(header_of(folder), device="cpu").modules}
    plain = {"model.embed_tokens", "lm_head"}
    plain |= {"model.layers.0.mlp.gate_proj"} if folder.name == "online" else set()
    assert {name for name, module in plan.items() if module.scheme.is_dense} == plain


def test_description() -> None:
    found = [reader_of(case(name)).describe() for name in ("bitlinear", "online")]
    assert found == ["bitnet, bitlinear, packed", "bitnet, autobitlinear, rounded at load"]


def test_inputs_are_those_of_the_layers() -> None:
    """transformers' ActQuant on the same x, but where 127 / amax and amax / 127 round apart."""
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, 64)[:, None]
    x[3] = 0.0
    x[4] = 1e-8  # below the smallest scale
    torch._dynamo.config.disable = True
    wanted = bitnet.ActQuant.apply(x)
    codes, scale = InputTransform(read(case("online"), NAME, SHAPE).weight.scheme.activation)(x)
    found = codes * scale
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-5) / 127
    assert ((found - wanted).abs() <= 1.01 * step).all()
    assert (((found - wanted).abs() > 1e-4 * step).sum()) <= 2
    assert not found[3:5].any()


def test_rounding_is_that_of_the_layer() -> None:
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    torch._dynamo.config.disable = True
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
        codes, scale = rounded(weight)
        assert torch.equal(((codes.float() - 1) * scale.float()).to(dtype), bitnet.WeightQuant.apply(weight))


# ---- what is wrong


def changed(name: str, out: Path, tensors: dict | None = None, **config: object) -> Path:
    """A fixture with other words in its config and other tensors (None: without it)."""
    seed = Seed.of(case(name))
    said = copy.deepcopy(seed.config)
    said["quantization_config"] |= config
    found = seed.tensors | (tensors or {})
    return seed.write(out, said, {key: tensor for key, tensor in found.items() if tensor is not None})


@pytest.mark.parametrize(
    ("name", "config", "code", "words"),
    [
        (
            "bitlinear",
            {"linear_class": "nonsense"},
            "E0212",
            "linear_class must be bitlinear or autobitlinear",
        ),
        ("bitlinear", {"quantization_mode": 3}, "E0212", "quantization_mode must be offline or online"),
        ("bitlinear", {"use_rms_norm": True}, "E0218", "a norm inside each Linear"),
        ("bitlinear", {"quantization_mode": "online"}, "E0212", "needs linear_class autobitlinear"),
        ("autobitlinear", {"quantization_mode": "online"}, "E0213", "must say offline"),
        ("online", {"quantization_mode": "offline"}, "E0213", "no tensor ends in .weight_scale"),
        ("online", {"modules_to_not_convert": [3]}, "E0212", "must be a list of module names"),
    ],
)
def test_wrong_configs(name: str, config: dict, code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=words) as raised:
        plan_model(open_checkpoint(str(changed(name, tmp_path, **config))), device="cpu")
    assert raised.value.code == code and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "suffix", "tensor", "code", "words"),
    [
        ("bitlinear", "weight", torch.full((8, 32), 0xFF, dtype=torch.uint8), "E0213", "not -1, 0 or 1"),
        ("bitlinear", "weight", torch.zeros(9, 32, dtype=torch.uint8), "E0213", r"\[8, 32\]"),
        ("bitlinear", "weight", torch.zeros(32, 32), "E0213", "BitNet stores U8"),
        ("bitlinear", "weight_scale", torch.zeros(1), "E0215", "bitlinear divides by"),
        ("bitlinear", "weight_scale", torch.ones(32), "E0213", "one scale a layer"),
        ("bitlinear", "weight_scale", torch.tensor([torch.nan]), "E0215", "NaN"),
        ("bitlinear", "weight_scale", None, "E0209", "weight_scale"),
        ("unpacked", "weight", torch.full((32, 32), 0.5), "E0213", "1,024 of 1,024"),
        ("unpacked", "weight_scale", None, "E0209", "weight_scale"),
        ("online", "weight", torch.full((32, 32), torch.inf), "E0215", "infinite"),
    ],
)
def test_wrong_tensors(name: str, suffix: str, tensor: object, code: str, words: str, tmp_path: Path) -> None:
    folder = changed(name, tmp_path, {f"{NAME}.{suffix}": tensor})
    with pytest.raises(LowbitError, match=words) as raised:
        read(folder, NAME, SHAPE)
    assert raised.value.code == code and NAME in str(raised.value) and "\n" not in str(raised.value)


def test_rows_that_are_no_whole_bytes(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="four rows to a byte"):
        read(case("bitlinear"), NAME, (33, 32))
