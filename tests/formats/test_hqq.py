"""HQQ: the tool's own files and values, odd layouts against numpy, damaged and written files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, read, reader_of, write_folder
from formats.hqq_columns import columns_llama
from formats.writing_cases import convert_and_compare, cruel, fixtures_it_takes, round_trip, scheme
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.doctor import examine
from lowbit.errors import LowbitError
from lowbit.formats import StoredLinear, StoredModule
from lowbit.formats.hqq import pack, unpack
from lowbit.formats.hqq_writer import HqqWriter as Writer
from lowbit.kernels import choose, native
from lowbit.kernels.cpu_blocks import CpuBlocks
from lowbit.kernels.reference import Reference
from lowbit.loading import load_model, plan_model
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme
from quantize.helpers import quantized

CASES = fixture_cases("hqq")
DOWN = "model.layers.0.mlp.down_proj"
NAME = "model.layers.0.self_attn.q_proj"
CPU = torch.device("cpu")


def case(name: str) -> Path:
    return next(path for path in CASES if path.name == name)


def float_zero(codes: str, *blocks: tuple[int, int], scales: str = "f16", **more: bool) -> Scheme:
    return replace(scheme(codes, *blocks, scales=scales, **more), zero="float")


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_the_tools_own_values(folder: Path) -> None:
    """Equal to the last bit: hqq's dequantizer in float32 on the numbers it stored."""
    for name, values in expected(folder).items():
        shape = (values.shape[0], values.shape[1])
        found = read(folder, name, shape, strict=True).weight
        assert torch.equal(found.dequantize(), values), f"{name}: {found.scheme}"
        assert found.scheme == reader_of(folder).scheme_of(StoredModule(name, name, shape))


def test_what_the_cases_cover() -> None:
    found = {}
    for path in CASES:
        for name, values in expected(path).items():
            found[path.name] = str(read(path, name, (values.shape[0], values.shape[1])).weight.scheme)
    assert found == {
        "4_g32": "uint4 1x32 bf16 float-zero",
        "8_row_f32": "uint8 1x32 f32 float-zero",
        "5_g16": "uint5 1x16 bf16 float-zero",
        "3_g16": "uint3 1x16 bf16 float-zero",
        "2_g16_float": "uint2 1x16 bf16 float-zero",
        "1_g8": "uint1 1x8 bf16 float-zero",
        "mixed": "uint8 1x32 bf16 float-zero",
        "4_g32_flat": "uint4 1x32 bf16 float-zero flat",
        "4_g16_axis0": "uint4 16x1 f16 float-zero scattered",
        "4_column": "uint4 allx1 bf16 float-zero",
    }
    assert header_of(case("2_g16_float")).tensors[f"{DOWN}.W_q"].dtype == "BF16"
    assert header_of(case("3_g16")).tensors[f"{DOWN}.W_q"].shape == (7, 16), "64 rows are padded to 70"


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_every_tensor_has_a_use(folder: Path) -> None:
    shape = tuple(next(iter(expected(folder).values())).shape)
    name = next(iter(expected(folder)))
    used = set(reader_of(folder).tensors_of(StoredModule(name, name, (shape[0], shape[1]))))
    assert used == {stored for stored in header_of(folder).tensors if stored.startswith(f"{name}.")}
    assert any(not module.scheme.is_dense for module in plan_model(header_of(folder)).modules)


def test_bias_and_float_modules() -> None:
    stored = load_file(case("4_g32") / "model.safetensors")
    bias = read(case("4_g32"), NAME, (32, 32)).bias
    assert bias is not None and torch.equal(bias, stored[f"{NAME}.bias"])
    assert read(case("4_g32"), "lm_head", (16, 32)).weight.scheme.is_dense
    assert read(case("mixed"), "model.layers.0.mlp.up_proj", (32, 32)).weight.scheme.is_dense


def test_description() -> None:
    assert reader_of(case("mixed")).describe() == "hqq, 2-bit group 16 and 8-bit group 32 in config.json"
    assert reader_of(case("4_column")).describe() == "hqq, 4-bit per channel in config.json"


def test_logits_are_those_of_the_tools_weights() -> None:
    import transformers

    folder = case("4_g32")
    config = transformers.LlamaConfig(**json.loads((folder / "config.json").read_text()))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.LlamaForCausalLM(config).float().eval()
    plain = {
        k: v.float() for k, v in load_file(folder / "model.safetensors").items() if v.is_floating_point()
    }
    plain = {k: v for k, v in plain.items() if k.endswith((".weight", ".bias"))}
    model.load_state_dict(plain | {f"{name}.weight": values for name, values in expected(folder).items()})
    tokens = [3, 1, 15, 7, 7, 0, 9]
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0]
    ours = prompt_logits(load_model(open_checkpoint(str(folder)), device="cpu"), [tokens])[0]
    assert torch.allclose(ours, theirs, atol=0.03 * float(theirs.abs().max())), (ours - theirs).abs().max()
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


# ---- packing, against numpy


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_slabs(bits: int) -> None:
    """Each slab is a run of rows; the first lies highest."""
    rng = np.random.default_rng(bits)
    rows, columns = (33, 5) if bits in (3, 5, 6, 8) else (48, 5)
    codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    count = 10 if bits == 3 else 8 // bits if bits in (1, 2, 4) else 1
    items = np.zeros((-(-rows // count), columns), np.int64)
    for row in range(rows):
        slab, place = divmod(row, len(items))
        items[place] |= codes[row].astype(np.int64) << bits * (count - 1 - slab)
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.dtype == (torch.int32 if bits == 3 else torch.uint8)
    assert np.array_equal(packed.numpy().astype(np.int64), items)
    raw = packed.contiguous().view(-1).view(torch.uint8)
    assert np.array_equal(unpack(raw, bits, (rows, columns)).numpy(), codes)


@pytest.mark.parametrize(
    ("axis", "size"), [(1, 8), (1, 16), (1, 24), (1, 48), (0, 8), (0, 24), (0, 16), (0, 6), (0, 48)]
)
def test_groups_of_any_size_and_axis(axis: int, size: int, tmp_path: Path) -> None:
    """Groups that divide neither rows nor columns too, against the definition on the flat weight."""
    shape, bits = (24, 48), 4
    random = torch.Generator().manual_seed(size)
    count = shape[0] * shape[1]
    grid = (count // size, size) if axis else (size, count // size)
    codes = torch.randint(0, 16, grid, generator=random, dtype=torch.uint8)
    one = (count // size, 1) if axis else (1, count // size)
    scale, zero = torch.rand(one, generator=random) + 0.5, torch.randn(one, generator=random) * 9
    config = rule(bits, size, axis)
    folder = write_folder(
        tmp_path, module_tensors(pack(codes, bits), scale, zero, shape, bits, size, axis), config
    )
    found = read(folder, NAME, shape, strict=True).weight
    assert torch.equal(found.dequantize(), ((codes.float() - zero) * scale).view(shape))
    assert found.scheme.scattered == (axis == 0 and size in (6, 8)), "24 rows in groups that divide them"


@pytest.mark.skipif(native.library() is None, reason="no native library")
@pytest.mark.parametrize("name", ["4_g16_axis0", "4_column"])
def test_columns_run_native(name: str) -> None:
    """Packed at their own size, with the products of the tool's weights."""
    folder = case(name)
    plan = plan_model(header_of(folder), device="cpu")
    assert {module.kernel for module in plan.modules if not module.scheme.is_dense} == {"cpu_columns"}
    for module, values in expected(folder).items():
        weight = read(folder, module, (values.shape[0], values.shape[1])).weight
        kernel = choose(weight.scheme, weight.shape, CPU).kernel
        packed = kernel.pack(weight, CPU)
        assert kernel.name == "cpu_columns" and torch.equal(kernel.unpack(packed).dequantize(), values)
        x = torch.randn(5, values.shape[1], generator=torch.Generator().manual_seed(2))
        wanted = x @ values.T
        found = kernel.linear(x, packed)
        assert (found - wanted).norm() < 4e-3 * wanted.norm()
    model = load_model(header_of(folder), device="cpu")
    assert "cpu_columns" in model.kernels
    assert prompt_logits(model, [[3, 1, 15, 7]])[0].isfinite().all()


@pytest.mark.parametrize("size", [16, 32])
def test_a_whole_model_of_columns(size: int, tmp_path: Path) -> None:
    """Layers fused and with biases. 32 is all of K's and V's columns, which stay apart from Q then."""
    quantized_folder, plain = columns_llama(tmp_path, size)
    model = load_model(open_checkpoint(str(quantized_folder)), device="cpu")
    plan = plan_model(open_checkpoint(str(quantized_folder)), device="cpu")
    schemes = {module.name.rpartition(".")[2]: str(module.scheme) for module in plan.modules}
    assert schemes["q_proj"] == f"uint4 {size}x1 f16 float-zero scattered"
    whole = "allx1 f16 float-zero" if size == 32 else "16x1 f16 float-zero scattered"
    assert schemes["k_proj"] == f"uint4 {whole}"
    if native.library() is not None:
        assert {m.kernel for m in plan.modules if not m.scheme.is_dense} == {"cpu_columns"} <= model.kernels
    tokens = [3, 1, 15, 7, 7, 0, 9]
    wanted = prompt_logits(load_model(open_checkpoint(str(plain)), device="cpu", dtype="float32"), [tokens])
    found = prompt_logits(model, [tokens])[0]
    assert (found - wanted[0]).norm() < 0.02 * wanted[0].norm()
    options = {"device": "cpu", "dtype": "float32", "linear_kernel": "reference"}
    exact = prompt_logits(load_model(open_checkpoint(str(quantized_folder)), **options), [tokens])[0]
    assert (exact - wanted[0]).norm() < 1e-5 * wanted[0].norm()


def rule(bits: float, size: int | None, axis: int = 1) -> dict:
    weight = {"nbits": bits, "group_size": size, "axis": axis}
    return {
        "quant_method": "hqq",
        "quant_config": {"weight_quant_params": weight},
        "skip_modules": ["lm_head"],
    }


def module_tensors(
    packed: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, int], bits: float, size: int, axis: int = 1
) -> dict[str, Tensor]:
    number = torch.float32 if isinstance(bits, float) else torch.int32
    found = {"W_q": packed, "scale": scale, "zero": zero, "shape": torch.tensor(shape)}
    found |= {"nbits": torch.tensor(bits, dtype=number), "group_size": torch.tensor(size, dtype=torch.int32)}
    found |= {"axis": torch.tensor(axis, dtype=torch.int32), "quant_zero": torch.tensor(0, dtype=torch.uint8)}
    return {f"{NAME}.{name}": tensor for name, tensor in found.items()}


def test_1_58_bits_are_two(tmp_path: Path) -> None:
    """hqq packs three values as 2 bits and says nbits 1.58."""
    codes = torch.randint(0, 3, (64, 16), dtype=torch.uint8)
    scale, zero = torch.rand(64, 1) + 0.5, torch.rand(64, 1)
    tensors = module_tensors(pack(codes, 2), scale, zero, (32, 32), 1.58, 16)
    found = read(write_folder(tmp_path, tensors, rule(1.58, 16)), NAME, (32, 32), strict=True).weight
    assert found.scheme.weight.name == "uint2"
    assert torch.equal(found.dequantize(), ((codes.float() - zero) * scale).view(32, 32))


# ---- wrong


def sound() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (64, 16), generator=random, dtype=torch.uint8)
    scale, zero = torch.rand(64, 1, generator=random), torch.rand(64, 1, generator=random)
    return module_tensors(pack(codes, 4), scale, zero, (32, 32), 4, 16)


NAN = torch.ones(64, 1)
NAN[3] = float("nan")
DAMAGE = [
    ("W_q", None, "E0213"),
    ("scale", None, "E0209"),
    ("zero", None, "E0209"),
    ("scale", NAN, "E0215"),
    ("zero", NAN, "E0215"),
    ("scale", torch.ones(64), "E0213"),
    ("scale", torch.ones(32, 1), "E0213"),
    ("scale", torch.ones(63, 1), "E0213"),
    ("zero", torch.ones(64, 1).half(), "E0213"),
    ("zero", torch.ones(1, 64), "E0213"),
    ("W_q", torch.zeros(32, 15, dtype=torch.uint8), "E0213"),
    ("W_q", torch.zeros(32, 16, dtype=torch.int16), "E0213"),
    ("nbits", torch.tensor(5, dtype=torch.int32), "E0213"),
    ("nbits", torch.ones(40, dtype=torch.int32), "E0213"),
    ("group_size", torch.tensor(8, dtype=torch.int32), "E0213"),
    ("axis", torch.tensor(0, dtype=torch.int32), "E0213"),
    ("shape", torch.tensor([16, 64]), "E0210"),
    ("quant_zero", torch.tensor(1, dtype=torch.uint8), "E0218"),
]


@pytest.mark.parametrize(("suffix", "tensor", "code"), DAMAGE, ids=lambda value: str(value)[:24])
def test_damaged_states(suffix: str, tensor: Tensor | None, code: str, tmp_path: Path) -> None:
    tensors = {k: v for k, v in sound().items() if k != f"{NAME}.{suffix}"}
    tensors |= {} if tensor is None else {f"{NAME}.{suffix}": tensor}
    with pytest.raises(LowbitError) as caught:
        read(write_folder(tmp_path, tensors, rule(4, 16)), NAME, (32, 32))
    assert caught.value.code == code and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"quant_config": []}, "E0212"),
        ({"quant_config": {"self_attn.q_proj": {}}}, "E0212"),
        (rule(7, 16), "E0212"),
        (rule(True, 16), "E0212"),
    ],
    ids=str,
)
def test_impossible_configs(config: dict, code: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        read(write_folder(tmp_path, sound(), {"quant_method": "hqq"} | config), NAME, (32, 32))
    assert caught.value.code == code


def test_a_wrong_number_of_bits_is_seen(tmp_path: Path) -> None:
    """The tensors win where they can; 8, 6 and 5 bits look alike, and there ``nbits`` must agree."""
    folder = write_folder(tmp_path / "four", sound(), rule(2, 16))
    assert read(folder, NAME, (32, 32)).weight.scheme.weight.name == "uint4"
    with pytest.raises(LowbitError, match="says 2 bits") as caught:
        read(folder, NAME, (32, 32), strict=True)
    assert caught.value.code == "E0214"
    codes = torch.full((64, 16), 31, dtype=torch.uint8)
    tensors = module_tensors(codes, torch.ones(64, 1), torch.ones(64, 1), (32, 32), 5, 16)
    with pytest.raises(LowbitError, match="correct the config"):
        read(write_folder(tmp_path / "eight", tensors, rule(8, 16)), NAME, (32, 32))
    tensors[f"{NAME}.W_q"] = codes + 1
    with pytest.raises(LowbitError, match="holds code 32; 5 bits end at 31"):
        read(write_folder(tmp_path / "five", tensors, rule(5, 16)), NAME, (32, 32))


def test_safetensors_without_their_config(tmp_path: Path) -> None:
    write_folder(tmp_path, sound(), None)
    with pytest.raises(LowbitError, match="part of a HQQ weight but config.json names no quantization"):
        read(tmp_path, NAME, (32, 32))


def test_the_doctor_reads_them() -> None:
    """Without a tokenizer, so without its language canary; nothing else to say."""
    for folder in CASES:
        findings = examine(folder).report.findings
        assert all(finding.severity == "note" for finding in findings), (folder.name, findings)


def test_codes_as_floats_are_not_quantized_again() -> None:
    with pytest.raises(LowbitError) as caught:
        plan_model(open_checkpoint(str(case("2_g16_float"))), quantization="int8")
    assert caught.value.code == "E0401" and "already quantized (hqq, 2-bit group 16" in str(caught.value)


# ---- native kernels take float zero points


@pytest.mark.skipif(native.library() is None, reason="no native library")
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("scales", ["f16", "bf16", "f32"])
def test_native(bits: int, scales: str) -> None:
    made, shape = float_zero(f"uint{bits}", (1, 32), scales=scales), (33, 96)
    weight = cruel(made, shape, bits)
    kernel = CpuBlocks()
    if kernel.refuses(made, shape, CPU) is not None:
        assert "would take" in str(kernel.refuses(made, shape, CPU))
        return
    packed = kernel.pack(weight, CPU)
    again = kernel.unpack(packed).dequantize()
    exact = weight.dequantize()
    if scales == "f32":
        assert weight.zeros is not None
        largest = (weight.zeros.abs() + 2**bits) * weight.scales[0]
        assert ((again - exact).abs() <= largest.repeat_interleave(32, 1) * 2.0**-22).all()
    else:
        assert torch.equal(again, exact), "nothing is rounded"
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    reference = Reference()
    wanted = reference.linear(x, reference.pack(weight, CPU))
    assert torch.allclose(kernel.linear(x, packed), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    ids = torch.tensor([0, 32, 7])
    assert torch.allclose(
        kernel.rows(packed, ids), exact[ids], rtol=1e-6, atol=2.0**-21 * float(exact.abs().max())
    )


@pytest.mark.skipif(native.library() is None, reason="no native library")
def test_zero_points_beyond_float16() -> None:
    """What bfloat16 arithmetic makes of them: the codes are lost beside the zero point."""
    made, shape = float_zero("uint4", (1, 32), scales="bf16"), (16, 64)
    weight = cruel(made, shape)
    assert weight.zeros is not None
    weight.zeros[3, 1], weight.zeros[5, 0] = 70000.0, -3e30
    weight.scales[0][5, 0] = 2.0**-90
    tools = (weight.codes.bfloat16() - weight.zeros.repeat_interleave(32, 1)) * weight.scales[
        0
    ].repeat_interleave(32, 1)
    again = CpuBlocks().unpack(CpuBlocks().pack(weight, CPU)).dequantize()
    assert torch.equal(again[3, 32:].bfloat16(), tools[3, 32:]) and torch.equal(
        again[5, :32].bfloat16(), tools[5, :32]
    )
    untouched = torch.ones(16, dtype=torch.bool)
    untouched[[3, 5]] = False
    assert torch.equal(again[untouched], weight.dequantize()[untouched])


def test_far_from_zero() -> None:
    """A group whose zero point hqq stores as infinity keeps its weights to a last bit of float16."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)) * 1e-3 + 1000.0
    found = quantized("hqq", weight)
    assert found.zeros is not None and found.zeros.isfinite().all()
    assert ((found.dequantize() - weight).abs() <= 1.0).all()


# ---- written


SCHEMES = [
    *(float_zero(f"uint{bits}", (1, 16)) for bits in (1, 2, 3, 4, 5, 6, 8)),
    float_zero("uint4", (1, 64), scales="bf16"),
    float_zero("uint4", (1, 32), scales="f32"),
    float_zero("uint3", (1, 48), flattened=True),
    float_zero("uint8", (0, 1)),
    float_zero("uint4", (8, 1), scattered=True),
    float_zero("uint3", (12, 1), scales="bf16", scattered=True),
]


@pytest.mark.parametrize("made", SCHEMES, ids=str)
def test_round_trip(made: Scheme, tmp_path: Path) -> None:
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    modules = {
        name: StoredLinear(cruel(made, (24, 64), n), torch.arange(24.0)) for n, name in enumerate(names)
    }
    round_trip(tmp_path, Writer, modules)


def test_mixed_kinds(tmp_path: Path) -> None:
    modules = {f"m{chr(97 + n)}": StoredLinear(cruel(made, (24, 64), n)) for n, made in enumerate(SCHEMES)}
    round_trip(tmp_path, Writer, modules)


@pytest.mark.parametrize("text", ["hqq", "hqq:bits=2", "hqq:bits=3,group_size=32", "hqq:bits=8"])
def test_what_quantizing_at_load_makes_is_stored(text: str, tmp_path: Path) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(3)) * 0.05
    weight[1, :64], weight[2, 64:] = 0.0, weight[2, 64:].abs() + 3.0
    round_trip(tmp_path, Writer, {NAME: StoredLinear(quantized(text, weight))})


@pytest.mark.parametrize("folder", fixtures_it_takes(Writer, "hqq"), ids=lambda folder: folder.name)
def test_fixtures(folder: Path, tmp_path: Path) -> None:
    """Written again: the tool's file and ours are the same, tensor by tensor, but for float views."""
    convert_and_compare(folder, "hqq", tmp_path / "out")
    theirs = load_file(folder / "model.safetensors")
    ours: dict[str, Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        ours |= load_file(path)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if name.endswith((".W_q", ".view_as_float")) and "float" in folder.name:
            continue
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name


def test_takes_all_it_should() -> None:
    taken = {folder.name for folder in fixtures_it_takes(Writer, "hqq")}
    assert {folder.name for folder in CASES} == taken


def test_other_rows_of_a_block_are_not_written() -> None:
    made = float_zero("uint4", (8, 1), scattered=True)
    weight = cruel(made, (24, 64))
    other = replace(weight, row_groups=torch.arange(24) // 8)
    module = StoredModule(NAME, NAME, (24, 64))
    with pytest.raises(LowbitError, match="rows of a block are not 3 apart"):
        Writer({NAME: made}).write(module, other, None, None)
    assert Writer({NAME: made}).write(module, weight, None, None)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (scheme("uint4", (1, 32), zero=True), "float zero points"),
        (float_zero("uint7", (1, 32)), "codes are unsigned"),
        (float_zero("uint4", (2, 32)), "do not fit"),
        (float_zero("uint4", (1, 48)), "do not fit"),
        (float_zero("uint4", (1, 32), reordered=True), "no place"),
        (float_zero("uint4", (10, 1), scattered=True), "do not fit"),
        (float_zero("uint4", (8, 1)), "do not fit"),
        (float_zero("uint4", (1, 0), flattened=False), "no whole bytes"),
    ],
    ids=str,
)
def test_refusals(made: Scheme, reason: str) -> None:
    shape = (63, 64) if made.blocks[0] == (1, 0) else (64, 64)
    assert reason in (Writer.refuses_to_write(made, shape) or "")


def test_one_way_for_a_kind_of_layer() -> None:
    four, three = float_zero("uint4", (1, 32)), float_zero("uint3", (1, 32))
    with pytest.raises(LowbitError, match="one way for all of a kind") as caught:
        Writer({"model.layers.0.mlp.up_proj": four, "model.layers.1.mlp.up_proj": three})
    assert caught.value.code == "E0450"


def test_no_quantized_module_is_skipped_for_a_word_in_its_name() -> None:
    """transformers 4 skips each module whose name contains one of skip_modules, and drops its tensors."""
    four, plain = float_zero("uint4", (1, 32)), Scheme(number_format("bf16"))
    names = {
        "model.layers.0.mlp.gate_proj": four,
        "model.layers.1.mlp.gate": plain,  # a router: mlp.gate is in mlp.gate_proj
        "model.layers.1.self_attn.o_proj": plain,
        "lm_head": plain,
    }
    skipped = Writer(names).quantization_config()["skip_modules"]
    assert skipped == ["model.layers.1.mlp.gate", "self_attn.o_proj", "lm_head"]
    for name, made in names.items():
        assert any(word in name for word in skipped) == made.is_dense


@pytest.mark.slow
@pytest.mark.parametrize("folder", fixtures_it_takes(Writer, "hqq"), ids=lambda folder: folder.name)
def test_the_tool_loads_them(folder: Path, tmp_path: Path) -> None:
    """hqq's own HQQLinear takes the written state, and its dequantizer gives the same weights."""
    tool = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    from lowbit.loading.convert import convert

    convert(open_checkpoint(str(folder)), "hqq", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in expected(folder).items():
        layer = tool.HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
        state = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
        layer.load_state_dict(state)
        assert torch.equal(layer.dequantize(), values), name


def test_weights_without_groups_are_whole(tmp_path: Path) -> None:
    """One group for everything: axis 1 by default, axis 0 where the config says so."""
    made = float_zero("uint8", (1, 48), flattened=True)
    weight = QuantizedTensor(
        made, (2, 24), torch.arange(48, dtype=torch.uint8).view(2, 24), (torch.ones(1).half(),)
    )
    weight = replace(weight, zeros=torch.full((1,), 3.5).half())
    round_trip(tmp_path, Writer, {NAME: StoredLinear(weight)})
