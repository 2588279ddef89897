"""QuIP#: codebooks, Hadamard matrices and weights against the tool's own; fused layers; damaged files
refused."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract.test_linear_kernels import needs_native
from formats.helpers import expected, fixture_cases, header_of, last_bit, read, reader_of
from formats.mutations import Seed
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.cpu_lattice import CpuLattice
from lowbit.loading import load_model, plan_model
from lowbit.loading.convert import convert
from lowbit.numerics.hadamard import hadamard_factors, times
from lowbit.numerics.lattice import e8, e8p

CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("quip_sharp")]
LAYER = "model.layers.0."
QKV, OUT = f"{LAYER}self_attn.qkv_proj", f"{LAYER}self_attn.o_proj"
UP, GATE, DOWN = (f"{LAYER}mlp.{leaf}_proj" for leaf in ("up", "gate", "down"))
UPGATE = f"{LAYER}mlp.upgate_proj"
SHAPES = {QKV: (96, 64), OUT: (64, 64), UPGATE: (384, 64), DOWN: (64, 192)}
SCHEMES = {"e8p12": "e8p", "e8p12_rvq4": "e8p+e8p/3.6", "e8p12_rvq3_rank": "f16"}
PROMPT = [[1, 2, 3, 4, 5, 6, 7]]


def case(name: str) -> Path:
    return next(folder for folder in fixture_cases("quip_sharp") if folder.name == name)


def wanted(folder: Path) -> dict[str, Tensor]:
    """The tool's values by stored module: up and gate below each other."""
    values = expected(folder)
    return values | {UPGATE: torch.cat([values.pop(UP), values.pop(GATE)])} if UP in values else values


def digest(values: Tensor) -> str:
    return hashlib.sha256((values * 4).to(torch.int8).numpy().tobytes()).hexdigest()


def kronecker(factors: list[Tensor]) -> Tensor:
    whole = torch.ones(1, 1)
    for factor in factors:
        whole = torch.kron(whole, factor)
    return whole


def test_tables_are_the_tools() -> None:
    """The tool's own tables, by their hashes."""
    told = json.loads((case("e8p12") / "tables.json").read_text())
    assert digest(e8p()) == told.pop("e8p") and digest(e8()) == told.pop("e8")
    assert len(told) == 12
    for order, wanted in told.items():
        factors = hadamard_factors(int(order))
        assert factors is not None and digest(kronecker(factors)) == wanted, order


@pytest.mark.parametrize("order", [1, 2, 64, 128, 12 * 8, 20, 28 * 4, 172 * 2])
def test_hadamard(order: int) -> None:
    factors = hadamard_factors(order)
    assert factors is not None
    whole = kronecker(factors)
    assert torch.equal(whole @ whole.T, order * torch.eye(order))
    x = torch.randint(-9, 9, (3, order, 5)).float()
    assert torch.equal(times(factors, x, 5), whole @ x)
    flat = x.transpose(1, 2).contiguous()
    assert torch.equal(times(factors, flat, 1), (whole @ x).transpose(1, 2))


@pytest.mark.parametrize("order", [0, 3, 7, 12 * 3, 172 * 3, 11, 44])
def test_orders_that_the_tool_has_not(order: int) -> None:
    assert (hadamard_factors(order) is None) == (order != 36)


@pytest.mark.parametrize("folder", CASES)
def test_the_tools_own_values(folder: Path) -> None:
    """To the last bit of float16, or of float32 sums that cancel: the tool rounds after each transform."""
    found = wanted(folder)
    assert {QKV, DOWN} <= set(found)
    for name, values in found.items():
        weight = read(folder, name, (values.shape[0], values.shape[1])).weight
        assert weight.scheme.weight.name == SCHEMES[folder.name]
        decoded = weight.dequantize()
        assert torch.equal(decoded, decoded.half().float())
        apart = (decoded - values.float()).abs()
        allowed = last_bit(torch.float16, values.float()) + 1e-6 * values.abs().max().float()
        assert (apart <= allowed).all(), name
        assert (apart == 0).float().mean() > 0.98, name


@pytest.mark.parametrize("folder", CASES)
def test_some_rows_are_those_of_all(folder: Path) -> None:
    shape = wanted(folder)[DOWN].shape
    weight = read(folder, DOWN, (shape[0], shape[1])).weight
    whole = weight.dequantize()
    rows = weight.rows(13, 17)
    assert rows.scheme.is_dense and (rows.dequantize() - whole[13:17]).abs().max() <= 1e-3 * whole.abs().max()


def test_second_codes_of_8_bits_stay_packed(tmp_path: Path) -> None:
    """Without A B; with an A of zeros the weight is decoded, and the same but for where Wscale is rounded."""
    seed = Seed.of(case("e8p12_rvq3_rank"))
    zeros = {key: torch.zeros_like(one) for key, one in seed.tensors.items() if key.endswith(".A")}
    (tmp_path / "decoded").mkdir()
    decoded = seed.write(tmp_path / "decoded", seed.config, seed.tensors | zeros)
    told = seed.config["quip_params"] | {"lora_rank": 0}
    bare = {key: one for key, one in seed.tensors.items() if not key.endswith((".A", ".B"))}
    (tmp_path / "packed").mkdir()
    packed = seed.write(tmp_path / "packed", {**seed.config, "quip_params": told}, bare)
    assert "decoded to 16 bits a weight on a CPU" in reader_of(packed).describe()
    weight = read(packed, DOWN, (64, 320)).weight
    assert weight.scheme.weight.name == "e8p+e8/2.04" and weight.codes.shape == (64, 320 * 3 // 8)
    found, other = weight.dequantize(), read(decoded, DOWN, (64, 320)).weight.dequantize()
    assert torch.allclose(found, other, rtol=2e-3, atol=1e-6)
    logits = [prompt_logits(load_model(header_of(one), device="cpu"), PROMPT)[0] for one in (packed, decoded)]
    assert (logits[0] - logits[1]).abs().max() < 1e-2 * logits[1].abs().max()


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices are transformed some rows and columns at a time."""
    folder = case("e8p12_rvq3_rank")
    shape = (64, 320)
    whole = read(folder, DOWN, shape).weight.codes
    monkeypatch.setattr("lowbit.numerics.lattice._SLICE", 320 * 16)
    apart = read(folder, DOWN, shape).weight.codes
    assert torch.allclose(apart.float(), whole.float(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("folder", CASES)
def test_a_model_answers_and_the_plan_says_what_it_costs(folder: Path) -> None:
    plan = plan_model(header_of(folder), device="cpu")
    inside = [module for module in plan.modules if ".layers." in module.name]
    packed = native.library() is not None and SCHEMES[folder.name] != "f16"
    bits = {"e8p12": 2, "e8p12_rvq4": 4}[folder.name] if packed else 16
    assert {module.scheme.weight.name for module in inside} == {SCHEMES[folder.name]}
    for module in inside:
        beside = module.nbytes - bits * module.shape[0] * module.shape[1] // 8
        scales = 2 * sum(module.shape) if packed else 0  # and what is one number
        assert scales <= beside <= scales + 32 * packed, module.name
    assert ("decoded to 16 bits" in reader_of(folder).describe()) == (SCHEMES[folder.name] == "f16")
    model = load_model(header_of(folder), device="cpu")
    assert prompt_logits(model, PROMPT)[0].isfinite().all()
    if packed:
        assert "cpu_lattice" in model.kernels


@needs_native
@pytest.mark.parametrize("name", ["e8p12", "e8p12_rvq4"])
def test_packed_it_answers_as_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused layers of Q, K and V and of up and gate, to what bfloat16 inputs lose."""
    header = header_of(case(name))
    packed = prompt_logits(load_model(header, device="cpu"), PROMPT)[0]
    monkeypatch.setattr(CpuLattice, "refuses", lambda *_: "not here")
    model = load_model(header, device="cpu")
    assert "cpu_lattice" not in model.kernels
    decoded = prompt_logits(model, PROMPT)[0]
    assert (packed - decoded).norm() < 1e-2 * decoded.norm()
    assert not torch.equal(packed, decoded)


def test_the_model_is_that_of_the_tools_weights(tmp_path: Path) -> None:
    """Q, K, V, gate and up are where the plain model of the tool's weights has them."""
    folder = case("e8p12")
    seed, values = Seed.of(folder), expected(folder)
    parts = dict(zip("qkv", values.pop(QKV).split((64, 16, 16)), strict=True))
    plain = {f"{LAYER}self_attn.{part}_proj.weight": rows for part, rows in parts.items()}
    plain |= {f"{name}.weight": matrix for name, matrix in values.items()}
    stems = (QKV, OUT, UPGATE, DOWN)
    plain |= {
        name: t for name, t in seed.tensors.items() if not name.startswith(tuple(f"{s}." for s in stems))
    }
    config = {key: value for key, value in seed.config.items() if key != "quip_params"}
    dense = seed.write(tmp_path, config, plain)
    a, b = (prompt_logits(load_model(header_of(path), device="cpu"), PROMPT)[0] for path in (folder, dense))
    assert torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))


def test_converted_it_is_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written says nothing of QuIP# any more and gives the answer of decoded weights."""
    folder, out = case("e8p12"), tmp_path / "out"
    assert not convert(header_of(folder), "dense", out).errors
    assert "quip_params" not in json.loads((out / "config.json").read_text())
    assert {f"{GATE}.weight", f"{UP}.weight"} <= set(header_of(out).tensors)
    monkeypatch.setattr(CpuLattice, "refuses", lambda *_: "not here")
    a, b = (prompt_logits(load_model(header_of(path), device="cpu"), PROMPT)[0] for path in (folder, out))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({f"{DOWN}.Qidxs": torch.zeros(64, 5, dtype=torch.int64)}, "E0213"),
        ({f"{DOWN}.Qidxs": torch.zeros(32, 6, dtype=torch.int64)}, "E0213"),
        ({f"{DOWN}.Qidxs": torch.zeros(64, 6, dtype=torch.int32)}, "E0213"),
        ({f"{DOWN}.SU": torch.ones(64).half()}, "E0213"),
        ({f"{DOWN}.SU": torch.full((192,), float("nan")).half()}, "E0215"),
        ({f"{DOWN}.SV": torch.ones(192).half()}, "E0213"),
        ({f"{DOWN}.SV": torch.full((64,), 6e4).half()}, "E0215"),
        ({f"{DOWN}.SV": None}, "E0209"),
        ({f"{DOWN}.Wscale": torch.ones(1)}, "E0213"),
        ({f"{DOWN}.Wscale": torch.tensor(float("inf"))}, "E0215"),
        ({f"{DOWN}.Wscale": torch.tensor(1)}, "E0213"),
        ({f"{DOWN}.codebook_id": torch.tensor(17)}, "E0213"),
        ({f"{DOWN}.codebook_id": torch.tensor(-(2**40))}, "E0213"),
        ({f"{DOWN}.codebook_id": torch.tensor([7])}, "E0213"),
        ({f"{DOWN}.codebook_id": None}, "E0209"),
        ({f"{QKV}.fuse_scales": torch.ones(2)}, "E0213"),
        ({f"{QKV}.fuse_scales": torch.tensor([1, float("nan"), 1])}, "E0215"),
        ({f"{QKV}.fuse_scales": None}, "E0209"),
        ({f"{UPGATE}.Qidxs": torch.zeros(192, 2, dtype=torch.int64)}, "E0213"),
        ({f"{UPGATE}.fuse_scales": torch.ones(3)}, "E0213"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    seed = Seed.of(case("e8p12"))
    [name] = change
    tensors = {key: value for key, value in (seed.tensors | change).items() if value is not None}
    folder = seed.write(tmp_path, seed.config, tensors)
    stem = name.rpartition(".")[0]
    with pytest.raises(LowbitError) as caught:
        read(folder, stem, SHAPES[stem])
    assert caught.value.code == code and stem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "suffix", "value", "code"),
    [
        ("e8p12_rvq3_rank", "A", torch.zeros(64, 3).half(), "E0213"),
        ("e8p12_rvq3_rank", "B", None, "E0209"),
        ("e8p12_rvq3_rank", "scaleWH", torch.zeros(320), "E0215"),
        ("e8p12_rvq3_rank", "scaleWH", None, "E0209"),
        ("e8p12_rvq3_rank", "Qidxs", torch.zeros(64, 10, dtype=torch.int64), "E0213"),
    ],
)
def test_damaged_parts_of_others(
    name: str, suffix: str, value: Tensor | None, code: str, tmp_path: Path
) -> None:
    seed = Seed.of(case(name))
    tensors = {
        key: one for key, one in (seed.tensors | {f"{DOWN}.{suffix}": value}).items() if one is not None
    }
    with pytest.raises(LowbitError) as caught:
        read(seed.write(tmp_path, seed.config, tensors), DOWN, (64, 320))
    assert caught.value.code == code and DOWN in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("codebook", "D4", "E0218"),
        ("codebook", "HI4B1C", "E0218"),
        ("codebook", None, "E0218"),
        ("codebook", ["E8P12"], "E0218"),
        ("codebook", "E8P12RVQ3B", "E0218"),  # another version of the packing
        ("codebook_version", 0, "E0218"),
        ("codebook_version", True, "E0218"),
        ("codesz", 4, "E0212"),
        ("fused", False, "E0218"),
        ("outlier_channel_split", True, "E0218"),
        ("outlier_channel_split", "no", "E0212"),
        ("rescale_WH", 1, "E0212"),
        ("rescale_WH", True, "E0209"),
        ("lora_rank", "8", "E0212"),
        ("lora_rank", 1.5, "E0212"),
        ("lora_rank", 2**70, "E0212"),
        ("lora_rank", 8, "E0209"),
        ("resid_scale_override", "3", "E0212"),
        ("resid_scale_override", 2.0**60, "E0212"),
        ("resid_scale_override", -2, "E0212"),
    ],
)
def test_configs_that_cannot_be(key: str, value: object, code: str, tmp_path: Path) -> None:
    seed = Seed.of(case("e8p12"))
    config = copy.deepcopy(seed.config)
    config["quip_params"][key] = value  # type: ignore[index]
    with pytest.raises(LowbitError) as caught:
        read(seed.write(tmp_path, config, seed.tensors), DOWN, SHAPES[DOWN])
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_another_codebook_than_the_tensors(tmp_path: Path) -> None:
    seed = Seed.of(case("e8p12"))
    config = copy.deepcopy(seed.config)
    config["quip_params"]["codebook"] = "E8P12RVQ4B"  # type: ignore[index]
    with pytest.raises(LowbitError, match=r"Qidxs.*\[64, 6\].*\[64, 12\]"):
        read(seed.write(tmp_path, config, seed.tensors), DOWN, SHAPES[DOWN])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"num_key_value_heads": 2}, "E0213"),
        ({"num_attention_heads": "4"}, "E0212"),
        ({"num_attention_heads": None}, "E0212"),
        ({"head_dim": 0}, "E0212"),
    ],
)
def test_heads_say_where_k_begins(change: dict[str, object], code: str, tmp_path: Path) -> None:
    seed = Seed.of(case("e8p12"))
    folder = seed.write(tmp_path, seed.config | change, seed.tensors)
    with pytest.raises(LowbitError) as caught:
        read(folder, QKV, SHAPES[QKV])
    assert caught.value.code == code


@pytest.mark.parametrize("shape", [(24, 192), (64, 96), (16 * 11, 192), (64, 64 * 11)])
def test_shapes_that_cannot_be_packed(shape: tuple[int, int]) -> None:
    with pytest.raises(LowbitError, match="Hadamard matrices of orders") as caught:
        read(case("e8p12"), DOWN, shape)
    assert caught.value.code == "E0213"


def test_a_dequantized_model_that_kept_its_config(tmp_path: Path) -> None:
    seed = Seed.of(case("e8p12"))
    tensors = {f"{DOWN}.weight": torch.zeros(64, 192).half()}
    with pytest.raises(LowbitError, match=r"quip_params says quip_sharp but no tensor ends in \.Qidxs"):
        reader_of(seed.write(tmp_path, seed.config, tensors))
