"""HIGGS: what transformers quantized and FLUTE packed, its orders, and damaged files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import FIXTURES, fixture_cases, header_of, read, reader_of
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.formats import flute_order
from lowbit.kernels import native
from lowbit.loading import load_model, plan_model
from lowbit.loading.source_modules import SourceModel

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("higgs")]
UP = "model.layers.0.mlp.up_proj"
ORDERS = load_file(FIXTURES / "higgs" / "orders.safetensors")


def case(name: str) -> Path:
    return FIXTURES / "higgs" / name


def logits(folder: Path, tokens: list[list[int]], **options: Any) -> Tensor:
    model = load_model(header_of(folder), device="cpu", kv_cache_dtype="f32", **options)
    return prompt_logits(model, tokens)[0]


@pytest.mark.parametrize("order", sorted({key.rpartition(".")[0] for key in ORDERS}))
def test_flutes_orders(order: str) -> None:
    """Two chunks of rows each, as FLUTE packs them for two templates of different tiles."""
    bits, template = (int(part) for part in order.split("."))
    codes, words = ORDERS[f"{order}.codes"], ORDERS[f"{order}.words"]
    tile = flute_order.tile_of(bits, template)
    assert len(codes) == 2 * flute_order.rows_together(bits, tile)
    found = flute_order.pairs(words, bits, tile)
    assert torch.equal(found, codes[:, 0::2] << bits | codes[:, 1::2])
    if bits != 3:
        other = flute_order.pairs(words, bits, 32 + 64 - tile)
        assert not torch.equal(other, found)


def test_flutes_templates() -> None:
    """The list of its own file."""
    listed = json.loads((FIXTURES / "higgs" / "templates.json").read_text())
    for bits in (2, 3, 4):
        own = [flute_order.tile_of(bits, number) for number in range(flute_order.templates(bits))]
        assert own == listed[str(bits)]


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_weights(folder: Path) -> None:
    """Grid and codes before they were packed, by transformers' formula, to the last bit."""
    known = load_file(folder / "expected.safetensors")
    scales = load_file(folder / "model.safetensors")
    compared = 0
    for key, codes in known.items():
        if key.endswith(".codes"):
            name = key.removesuffix(".codes")
            numbers = known[f"{name}.grid"].float()[codes.long()].flatten(1)
            scale = scales[f"{name}.scales"].float()
            wanted = numbers * scale.repeat_interleave(numbers.shape[1] // scale.shape[1], 1)
            found = read(folder, name, (wanted.shape[0], wanted.shape[1]), strict=True)
            assert torch.equal(found.weight.dequantize(), wanted), name
            assert found.input is not None and found.input.only_rotates
            compared += 1
    assert compared


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_logits(folder: Path) -> None:
    wanted = load_file(folder / "expected.safetensors")["logits"]
    tokens = json.loads((folder / "about.json").read_text())["tokens"]
    assert (logits(folder, tokens) - wanted).abs().max() <= 0.02 * wanted.abs().max()
    exact = logits(folder, tokens, linear_kernel="reference", dtype="float32")
    assert (exact - wanted).abs().max() <= 2e-5


def test_the_plan_says_what_it_costs() -> None:
    plan = plan_model(header_of(case("p2_2bit")), device="cpu")
    [up] = [module for module in plan.modules if module.name == UP]
    assert str(up.scheme) == "vq1x8_4 1x64 f16 (input rotated by hadamard 64)"
    assert up.scheme.bits_per_weight(up.shape) == 2.25
    if native.library() is not None:
        assert up.kernel == "cpu_vectors"
    [up] = [m for m in plan_model(header_of(case("p2_3bit")), device="cpu").modules if m.name == UP]
    assert str(up.scheme) == "vq1x6_2 1x64 f16 (input rotated by hadamard 64)"
    assert up.scheme.bits_per_weight(up.shape) == 4.25  # a byte for each six bits
    described = "higgs, 3-bit grid of single numbers, group 64, hadamard 64 in config.json"
    assert reader_of(case("p1_3bit")).describe() == described
    with pytest.raises(LowbitError) as caught:
        SourceModel(header_of(case("p2_2bit")))
    assert caught.value.code == "E0450"  # its inputs are rotated: no other format has that


def test_a_bias_is_added() -> None:
    """transformers' layer leaves it out."""
    found = read(case("p1_4bit"), UP, (128, 64))
    assert found.bias is not None and found.bias.abs().sum() > 0


def test_numbers_in_their_own_type(tmp_path: Path) -> None:
    """tables2 of BF16 scales: the tool labels their bits F16; one that casts them is read too."""
    seed = Seed.of(case("p2_4bit_tall"))
    name, shape = f"{UP}.tables2", (256, 64)
    assert seed.tensors[name].dtype is torch.float16
    right = read(case("p2_4bit_tall"), UP, shape).weight
    assert right.codebooks is not None and right.codebooks.dtype is torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16):
        grid = seed.tensors[name].view(torch.bfloat16).to(dtype)
        folder = seed.write(tmp_path / str(dtype), seed.config, seed.tensors | {name: grid})
        found = read(folder, UP, shape).weight.dequantize()
        assert (found - right.dequantize()).abs().max() <= 1e-5
    wrong = seed.tensors[name].bfloat16()  # the label believed, and cast
    folder = seed.write(tmp_path / "wrong", seed.config, seed.tensors | {name: wrong})
    with pytest.raises(LowbitError, match="half are below 1.85 in size, not 0.1 to 1.55") as caught:
        read(folder, UP, shape)
    assert caught.value.code == "E0215"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"weight": torch.zeros(32, 64, dtype=torch.int16)}, "E0213"),
        ({"weight": torch.zeros(64, 64)}, "E0213"),
        ({"weight": None}, "E0209"),
        ({"scales": torch.zeros(256, 2).half()}, "E0213"),
        ({"scales": torch.full((256, 1), float("nan")).half()}, "E0215"),
        ({"tables": torch.zeros(8).half()}, "E0213"),
        ({"tables": None}, "E0209"),
        ({"tables2": torch.zeros(16, 16, 2).half()}, "E0215"),
        ({"tables2": torch.zeros(16, 16, 1).half()}, "E0213"),
        ({"tables2": torch.ones(16, 16, 2).half() / torch.zeros(1).half()}, "E0215"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    seed = Seed.of(case("p2_4bit_tall"))
    changed = {f"{UP}.{key}": value for key, value in change.items()}
    tensors = {key: value for key, value in (seed.tensors | changed).items() if value is not None}
    folder = seed.write(tmp_path, seed.config, tensors)
    with pytest.raises(LowbitError) as caught:
        read(folder, UP, (256, 64))
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_single_numbers_are_the_tables_own(tmp_path: Path) -> None:
    seed = Seed.of(case("p1_4bit"))
    other = seed.tensors[f"{UP}.tables"].flip(0)
    folder = seed.write(tmp_path, seed.config, seed.tensors | {f"{UP}.tables": other})
    with pytest.raises(LowbitError, match=r"as .*\.p 1 has it") as caught:
        read(folder, UP, (128, 64))
    assert caught.value.code == "E0213"


@pytest.mark.parametrize(
    ("key", "value", "code", "said"),
    [
        ("bits", 5, "E0212", "bits must be 2, 3, 4, found 5"),
        ("bits", 3, "E0213", "stores"),
        ("bits", None, "E0212", "whole number"),
        ("p", 3, "E0212", "p must be 1, 2, found 3"),
        ("p", 1, "E0213", "p 1"),
        ("group_size", 32, "E0212", "64, 128, 256"),
        ("group_size", 128, "E0212", "group_size 128 divides, found 64"),
        ("hadamard_size", 192, "E0212", "power of two"),
        ("hadamard_size", 1024, "E0218", "64 inputs, which HIGGS pads to 1024"),
        ("tune_metadata", [1], "E0212", "an object"),
        ("tune_metadata", {}, "E0212", "said nowhere"),
        ("tune_metadata", None, "E0212", "said nowhere"),
    ],
)
def test_impossible_configs(key: str, value: object, code: str, said: str, tmp_path: Path) -> None:
    seed = Seed.of(case("p2_4bit_tall"))
    config = copy.deepcopy(seed.config)
    config["quantization_config"][key] = value  # type: ignore[index]
    with pytest.raises(LowbitError, match=said) as caught:
        read(seed.write(tmp_path, config, seed.tensors), UP, (256, 64))
    assert caught.value.code == code and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value", "code", "said"),
    [
        ("p2_4bit_tall", "template_id", 144, "E0218", "templates 0 to 143 of 4 bits"),
        ("p2_4bit_tall", "template_id", "0", "E0218", "template_id is '0'"),
        ("p2_3bit", "template_id", 0, "E0218", "template_id is 0, of tiles of 64"),
        ("p2_4bit_tall", "N", 128, "E0212", "N is 128, the module has 256"),
        ("p2_4bit_tall", "num_bits", 2, "E0212", "num_bits is 2, the module has 4"),
        ("p2_4bit_tall", "", 7, "E0212", "must be an object"),
    ],
)
def test_impossible_templates(
    name: str, key: str, value: object, code: str, said: str, tmp_path: Path
) -> None:
    seed = Seed.of(case(name))
    config = copy.deepcopy(seed.config)
    templates: Any = config["quantization_config"]["tune_metadata"]  # type: ignore[index]
    if key:
        templates[UP][key] = value
    else:
        templates[UP] = value
    with pytest.raises(LowbitError, match=said) as caught:
        read(seed.write(tmp_path, config, seed.tensors), UP, (512 if "3bit" in name else 256, 64))
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_rows_that_a_template_does_not_pack(tmp_path: Path) -> None:
    """128 rows of 4 bits: tiles of 64 take 256."""
    seed = Seed.of(case("p1_4bit"))
    config = copy.deepcopy(seed.config)
    config["quantization_config"]["tune_metadata"][UP]["template_id"] = 0  # type: ignore[index]
    with pytest.raises(LowbitError, match=r"128 rows; .*up_proj packs 256 together") as caught:
        read(seed.write(tmp_path, config, seed.tensors), UP, (128, 64))
    assert caught.value.code == "E0213"


def test_processors_that_had_no_table(tmp_path: Path) -> None:
    seed = Seed.of(case("before_4_50"))
    packed = {f"{UP}.num_sms_packed": torch.tensor(-1, dtype=torch.int32)}
    folder = seed.write(tmp_path, seed.config, seed.tensors | packed)
    with pytest.raises(LowbitError, match=r"is \[-1\]; .* 84, 108, 128 processors") as caught:
        read(folder, UP, (128, 128))
    assert caught.value.code == "E0218"


def test_other_spellings_of_a_module(tmp_path: Path) -> None:
    """The config may name it as a model with other parts does."""
    seed = Seed.of(case("p2_4bit_tall"))
    config = copy.deepcopy(seed.config)
    quantization: Any = config["quantization_config"]
    quantization["tune_metadata"] = {
        key.replace("model.", "model.language_model.", 1): value
        for key, value in quantization["tune_metadata"].items()
    }
    found = read(seed.write(tmp_path, config, seed.tensors), UP, (256, 64)).weight
    assert torch.equal(found.codes, read(case("p2_4bit_tall"), UP, (256, 64)).weight.codes)


def test_a_whole_model_generates() -> None:
    """The most likely next tokens are those of the float32 logits."""
    folder = case("p2_4bit")
    tokens = json.loads((folder / "about.json").read_text())["tokens"]
    wanted = load_file(folder / "expected.safetensors")["logits"]
    model = load_model(header_of(folder), device="cpu")
    found = prompt_logits(model, tokens)[0]
    best = wanted.topk(2)
    sure = best.values[:, 0] - best.values[:, 1] > 0.05
    assert sure.sum() >= 6
    assert torch.equal(found.argmax(-1)[sure], wanted.argmax(-1)[sure])
