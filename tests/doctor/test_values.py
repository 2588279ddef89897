"""Numbers: every kind of tensor with a number no sound checkpoint has, wherever in the slices it lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from doctor.helpers import QPROJ, Tensors, checked, dense, edit, gguf, gptq, only, rules
from lowbit.checkpoint.gguf_types import GGUF_TYPES_BY_NAME
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.doctor import Report, values
from lowbit.doctor.values import BLOCK_FLOATS, scan
from lowbit.numerics.number_formats import number_format

INF, NAN = torch.inf, torch.nan


def scanned(
    tmp_path: Path,
    name: str,
    tensor: torch.Tensor | np.ndarray,
    dtype: str,
    shape: tuple[int, ...] | None = None,
    limits: tuple[int, int] | None = None,
    beside: tuple[str, ...] = (),
) -> list[tuple[str, str]]:
    """(rule, message) of one tensor scanned by itself, at an odd place of a file."""
    raw = tensor
    if isinstance(tensor, torch.Tensor):
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"123" + raw.tobytes())
    shape = tuple(tensor.shape) if shape is None else shape
    tensors = {name: TensorEntry(name, file, dtype, shape, 3, raw.nbytes)}
    tensors |= {other: TensorEntry(other, file, "U8", (0,), 3, 0) for other in beside}
    report = Report()
    header = CheckpointHeader(tmp_path, "safetensors", tensors)
    scan(header, {}, {} if limits is None else {name: limits}, report)
    return [(finding.rule, finding.message) for finding in report.findings]


@pytest.fixture(params=[1 << 12, 4 << 20])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Slices smaller than a tensor, and larger."""
    monkeypatch.setattr(values, "SLICE", request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", [(0, 0), (40, 7), (99, 63)])
def test_floats(dtype: str, bad: float, where: tuple[int, int], slices: int, tmp_path: Path) -> None:
    tensor = torch.randn(100, 64).to(values.DTYPES[dtype])
    assert scanned(tmp_path, "a.weight", tensor, dtype) == []
    tensor[where] = bad
    tensor[99, 63] = NAN
    [(rule, message)] = scanned(tmp_path, "a.weight", tensor, dtype)
    assert rule == "D201"
    nans = int(tensor.isnan().sum())
    counts = f"{nans} NaN" + (
        " and 1 infinite" if nans + int(tensor.isinf().sum()) == 2 and nans == 1 else ""
    )
    assert f"holds {counts} of 6 400 numbers (first at {list(where)})" in message
    assert "'a.weight'" in message and f"({dtype} [100, 64])" in message


@pytest.mark.parametrize("name", ["model.norm.weight", f"{QPROJ}.weight", "lm_head.weight"])
def test_in_a_checkpoint(name: str, tmp_path: Path) -> None:
    edit(dense(tmp_path), lambda tensors: tensors[name].view(-1)[5:7].fill_(INF))
    assert "holds 2 infinite" in only(tmp_path, "D201")


@pytest.mark.parametrize(
    "name",
    [
        *("a.scales", "a.weight_scale", "a.weight_scale_inv", "a.weight_scale_2", "a.weight_global_scale"),
        *("a.input_scale", "a.SCB", "a.weight.absmax", "a.weight.nested_absmax", "a.k_scale", "a.s"),
        *("mlp.experts.down_proj_scale", "mlp.experts.gate_up_proj_scale_inv", "a.scale_packed"),
    ],
)
def test_scales_by_any_name(name: str, tmp_path: Path) -> None:
    tensor = torch.rand(8, 4) + 0.1
    assert scanned(tmp_path, name, tensor, "F32") == []
    tensor[1] = 0.0
    [(rule, message)] = scanned(tmp_path, name, tensor, "F32")
    assert rule == "D206" and "has 4 of 32 scales that are zero" in message
    tensor[2, 3] = NAN
    assert [rule for rule, _ in scanned(tmp_path, name, tensor, "F32")] == ["D202", "D206"]


def test_a_scale_of_a_scalar(tmp_path: Path) -> None:
    [(rule, message)] = scanned(tmp_path, "a.weight_scale", torch.tensor(NAN), "F32")
    assert rule == "D202" and "holds 1 NaN of 1 numbers (first at [])" in message


def test_gptq_scales(tmp_path: Path) -> None:
    edit(gptq(tmp_path), lambda tensors: tensors[f"{QPROJ}.scales"][1, 3].fill_(INF))
    assert f"'{QPROJ}.scales' (F16 [2, 64]) holds 1 infinite" in only(tmp_path, "D202")


@pytest.mark.parametrize(
    ("dtype", "nan"),
    [
        ("F8_E4M3", 0x7F),
        ("F8_E4M3", 0xFF),
        ("F8_E5M2", 0x7D),
        ("F8_E5M2", 0xFC),
        ("F8_E4M3FNUZ", 0x80),
        ("F8_E5M2FNUZ", 0x80),
    ],
)
def test_8_bit_floats(dtype: str, nan: int, slices: int, tmp_path: Path) -> None:
    codes = torch.randint(0, 0x7B, (300, 40), dtype=torch.uint8)
    assert scanned(tmp_path, "a.weight", codes, dtype) == []
    codes[250, 3] = nan
    kind = "infinite" if nan == 0xFC else "NaN"
    for name, rule in (("a.weight", "D203"), ("a.weight_scale", "D202")):
        found = dict(scanned(tmp_path, name, codes, dtype))
        assert f"holds 1 {kind} of 12 000 numbers (first at [250, 3])" in found[rule]


@pytest.mark.parametrize("dtype", ["F8_E8M0", "U8"])
def test_exponent_scales(dtype: str, tmp_path: Path) -> None:
    codes = torch.arange(255, dtype=torch.uint8).view(5, 51)
    assert scanned(tmp_path, "a.down_proj_scales", codes, dtype) == [], "2^-127 is no zero"
    codes[4, 50] = 255
    [(rule, message)] = scanned(tmp_path, "a.down_proj_scales", codes, dtype)
    assert rule == "D204" and "(first at [4, 50])" in message


def test_bytes_that_are_no_scales(tmp_path: Path) -> None:
    codes = torch.full((4, 4), 255, dtype=torch.uint8)
    assert scanned(tmp_path, "a.weight.absmax", codes, "U8") == [], "bitsandbytes quantizes them again"
    assert scanned(tmp_path, "a.weight_packed", codes, "U8") == []


def test_packed_bytes_stored_as_floats(tmp_path: Path) -> None:
    tensor = torch.full((64, 1), NAN)
    assert scanned(tmp_path, "a.weight", tensor, "F32", beside=("a.weight.quant_map",)) == []
    assert scanned(tmp_path, "a.weight", tensor, "F32") != []


@pytest.mark.parametrize(("low", "high"), [(-9, 7), (-8, 8)])
def test_codes_out_of_range(low: int, high: int, slices: int, tmp_path: Path) -> None:
    tensor = torch.randint(-8, 8, (200, 64), dtype=torch.int8)
    assert scanned(tmp_path, "a.weight", tensor, "I8", limits=(-8, 7)) == []
    tensor[0, 0], tensor[199, 63] = low, high
    [(rule, message)] = scanned(tmp_path, "a.weight", tensor, "I8", limits=(-8, 7))
    assert rule == "D207" and f"holds codes from {low} to {high}, its number of bits has -8 to 7" in message


@pytest.mark.parametrize("suffix", ["weight", "weight_zero_point"])
def test_limits_come_from_the_config(suffix: str, tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }
    dense(tmp_path, quantization_config=quantization)

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            stem, out = name.removesuffix(".weight"), tensors[name].shape[0]
            tensors[name] = torch.randint(-8, 8, tensors[name].shape, dtype=torch.int8)
            tensors[f"{stem}.weight_scale"] = torch.full((out, 1), 0.01)
            tensors[f"{stem}.weight_zero_point"] = torch.randint(-8, 8, (out, 1), dtype=torch.int8)

    edit(tmp_path, change)
    assert rules(tmp_path) == []
    edit(tmp_path, lambda tensors: tensors[f"{QPROJ}.{suffix}"][3].fill_(100))
    assert f"'{QPROJ}.{suffix}'" in only(tmp_path, "D207")


@pytest.mark.parametrize("name", [f"{QPROJ}.weight", "model.embed_tokens.weight"])
def test_a_matrix_of_zeros(name: str, tmp_path: Path) -> None:
    edit(dense(tmp_path), lambda tensors: tensors[name].zero_())
    assert repr(name) in only(tmp_path, "D208")


def test_zeros_that_may_be(tmp_path: Path) -> None:
    assert scanned(tmp_path, "a.bias", torch.zeros(64), "F32") == []
    assert scanned(tmp_path, "a.qzeros", torch.zeros(8, 8, dtype=torch.int32), "I32") == []
    [(rule, _)] = scanned(tmp_path, "a.qweight", torch.zeros(8, 8, dtype=torch.int32), "I32")
    assert rule == "D208"


# ---- GGUF ----


def blocks_of(kind: str, count: int) -> np.ndarray:
    """Random block bytes, their floats finite and not zero: 0x2Axx is about 0.05."""
    raw = np.random.default_rng(3).integers(0, 255, (count, GGUF_TYPES_BY_NAME[kind].bytes), dtype=np.uint8)
    for at in BLOCK_FLOATS.get(kind, ()):
        raw[:, at + 1] = 0x2A
    if kind == "IQ1_M":  # the top nibble of four words
        raw[:, [49, 51, 53, 55]] = raw[:, [49, 51, 53, 55]] & 15 | [[0x10, 0x10, 0xA0, 0x20]]
    return raw


QUANTIZED = sorted(name for name, kind in GGUF_TYPES_BY_NAME.items() if kind.weights > 1)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_block_floats_are_those_of_the_layouts(kind: str) -> None:
    """Spoiling exactly these bytes makes a block's scales NaN; spoiling all others never does."""
    layout = number_format(f"gguf_{kind.lower()}").block
    assert layout is not None

    def finite(raw: np.ndarray) -> bool:
        return bool(layout.decode(torch.from_numpy(raw)).isfinite().all())

    raw = blocks_of(kind, 8)
    assert finite(raw)
    for at in BLOCK_FLOATS.get(kind, ()):
        spoilt = raw.copy()
        spoilt[:, at + 1] = 0x7E
        assert not finite(spoilt), f"byte {at} is no float of {kind}"
    others = [
        n for n in range(layout.bytes) if n not in {a + b for a in BLOCK_FLOATS.get(kind, ()) for b in (0, 1)}
    ]
    if kind not in ("IQ1_M", "MXFP4"):
        raw[:, others] = 0xFF
        assert finite(raw), f"{kind} has another float"


@pytest.mark.parametrize("kind", QUANTIZED)
def test_blocks(kind: str, slices: int, tmp_path: Path) -> None:
    raw, weights = blocks_of(kind, 600), GGUF_TYPES_BY_NAME[kind].weights
    shape = (300, 2 * weights)
    assert scanned(tmp_path, "blk.0.ffn_up.weight", raw, kind, shape) == []
    if kind == "NVFP4":
        return  # its scales cannot be NaN
    spoil = {"IQ1_M": [49, 51, 53, 55], "MXFP4": [0]}.get(
        kind, [n + 1 for n in BLOCK_FLOATS.get(kind, ())[-1:]]
    )
    for n in (41, 599):
        raw[n, spoil] = 0xFF if kind in ("MXFP4", "IQ1_M") else 0x7C
        if kind not in ("MXFP4", "IQ1_M"):
            raw[n, spoil[0] - 1] = 0  # infinity
    [(rule, message)] = scanned(tmp_path, "blk.0.ffn_up.weight", raw, kind, shape)
    assert rule == "D205" and f"in 2 of 600 blocks (first with weight [20, {weights}])" in message


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q6_K", "NVFP4"])
def test_zero_blocks(kind: str, tmp_path: Path) -> None:
    raw = blocks_of(kind, 50)
    raw[7] = 0
    [(rule, message)] = scanned(tmp_path, "w", raw, kind, (50, GGUF_TYPES_BY_NAME[kind].weights))
    assert rule == "D206" and "has 1 of 50 scales" in message


def test_in_a_gguf_file(tmp_path: Path) -> None:
    file = gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": b"\x00\x7e"})
    assert "'blk.0.attn_q.weight' (Q8_0 [64, 64]) has NaN" in only(file, "D205")
    file = gguf(tmp_path / "n.gguf", {"output_norm.weight": np.float32(np.nan).tobytes()})
    assert "'output_norm.weight'" in only(file, "D201")


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    from lowbit.doctor import examine

    calls: list[tuple[int, int, str]] = []
    examine(dense(tmp_path), canary=False, on_progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] == checked(tmp_path).header.nbytes  # type: ignore[union-attr]
