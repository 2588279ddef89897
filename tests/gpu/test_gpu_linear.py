"""gpu_blocks and gpu_dense: every scheme of the linear contract beside its definition.

    unpack(pack(w)) == w      linear == x @ dequantize(w).T in float64      rows == dequantize(w)[ids]

Outputs are NaN before a call and wider than the result. With up to 128 tokens weights are not rounded, but
tables that bfloat16 does not hold; beyond they are rounded to x's type.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contract.test_linear_kernels import WEIGHTS, canonical, dense_weight, float_zero, normal_form
from gguf_blocks import random_blocks, tensor_of
from lowbit.errors import LowbitError
from lowbit.kernels import choose, parallel
from lowbit.kernels.gpu import gpu_kernel, runtime
from lowbit.kernels.gpu.linear import MOST_SLICE, GpuBlocks, GpuDense, slice_rows
from lowbit.kernels.gpu.programs import Cut
from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme, dense
from sparse_memory import sparse_zeros

BLOCKS, DENSE = GpuBlocks(), GpuDense()
# Refused: groups of 8, of one column, blocks over row ends that 16 does not divide, codes of other kernels.
NARROW = {
    name
    for name in WEIGHTS
    if re.search(
        r" g8|x1( |$)|flat g24|whole columns|tiles of|x(24|40|56) blocks|codebooks|trellis|lattice|outliers",
        name,
    )
}
TAKEN = [name for name in WEIGHTS if "dense" not in name and name not in NARROW]


def cut(weight: QuantizedTensor, rows: int, columns: int) -> QuantizedTensor:
    """The first rows and columns of a weight; the order of columns is another."""
    if weight.scheme.weight.block is not None:
        block = weight.scheme.weight.block
        codes = weight.codes[:rows, : columns // block.weights * block.bytes].contiguous()
        return replace(weight, shape=(rows, columns), codes=codes)

    def blocks(numbers: Tensor, level: int) -> Tensor:
        height, width = weight.scheme.blocks[level]
        return numbers[: -(-rows // (height or rows)), : -(-columns // (width or columns))].contiguous()

    order = None if weight.column_order is None else torch.arange(columns - 1, -1, -1)
    return replace(
        weight,
        shape=(rows, columns),
        codes=weight.codes[:rows, :columns].contiguous(),
        scales=tuple(blocks(numbers, level) for level, numbers in enumerate(weight.scales)),
        zeros=None if weight.zeros is None else blocks(weight.zeros, 0),
        offsets=tuple(blocks(numbers, level) for level, numbers in enumerate(weight.offsets)),
        column_order=order,
    )


def small(name: str) -> QuantizedTensor:
    """A weight of the contract in a size for the interpreter; its last tile is short where it was."""
    weight = WEIGHTS[name]()
    block = weight.scheme.weight.block
    if weight.scheme.flattened:
        return weight  # blocks go over row ends
    columns = weight.shape[1] % 64 + 64 if block is None else max(block.weights, 64)
    return cut(weight, 37, min(columns, weight.shape[1]))


@pytest.fixture
def floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 x is multiplied as it is, as on a GPU."""
    monkeypatch.setattr("lowbit.kernels.gpu.linear._rounds_floats", lambda device: False)


ROUNDED_TABLES = ("nf4", "fp4_bnb")


def as_multiplied(weight: QuantizedTensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """float64: the weight with the values that so many tokens of a type meet."""
    fmt = weight.scheme.weight
    if tokens > 128 and dtype is not torch.float32:
        return normal_form(weight).to(dtype).double()
    if tokens > 1 and fmt.name in ROUNDED_TABLES:
        values = NumberFormat("rounded", 4, tuple(fmt.table().to(dtype).tolist()))
        return normal_form(replace(weight, scheme=replace(weight.scheme, weight=values))).double()
    return normal_form(weight).double()


def product(
    weight: QuantizedTensor, tokens: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> float:
    """The largest error of a product, in |x| @ |w|; the output is float32 and lies in a wider one."""
    packed = BLOCKS.pack(weight, device)
    x = torch.randn(tokens, weight.shape[1] + 16, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    x = x[:, : weight.shape[1]]
    wide = torch.full((tokens, weight.shape[0] + 3), torch.nan, device=device)
    out = wide[:, : weight.shape[0]]
    found = BLOCKS.linear(x.to(device), packed, out)
    assert found is out and wide[:, weight.shape[0] :].isnan().all(), "what lies beside the output is not its"
    assert not out.isnan().any(), "poison was left"
    exact = as_multiplied(weight, tokens, dtype)
    scale = (x.double().abs() @ exact.abs().T).clamp(min=1e-30)
    return float(((out.cpu().double() - x.double() @ exact.T).abs() / scale).max())


@pytest.mark.parametrize("name", TAKEN)
def test_unpack_rows_and_restore_give_the_weight_back(name: str, device: torch.device) -> None:
    weight = small(name)
    packed = BLOCKS.pack(weight, device)
    again = BLOCKS.unpack(packed)
    expected = weight.expand()
    assert torch.equal(again.codes.cpu(), expected.codes)
    for one, other in zip(
        (*again.scales, *again.offsets), (*expected.scales, *expected.offsets), strict=True
    ):
        assert one.dtype is other.dtype and torch.equal(one.cpu().float(), other.float())
    uncounted = sum(packed.buffers[key].nbytes for key in ("table", "column_order") if key in packed.buffers)
    assert packed.nbytes - uncounted == BLOCKS.nbytes(weight.scheme, weight.shape)
    ids = torch.tensor([0, weight.shape[0] - 1, 5, 5, 16], dtype=torch.int32, device=device)
    restored = BLOCKS.restore(packed.scheme, packed.shape, dict(packed.buffers), packed.origin)
    rows = BLOCKS.rows(restored, ids).cpu().nan_to_num()
    wanted = normal_form(weight)[ids.cpu().long()]
    # A GPU may add an offset without rounding the product: a last bit of it.
    torch.testing.assert_close(rows, wanted, rtol=0 if device.type == "cpu" else 1e-6, atol=0)


DECODED = [  # every width of codes, kind of values, zero points, offsets and levels of scales
    *("gguf q2_k", "gguf q4_k", "gguf q6_k", "gguf iq2_xxs", "gguf q1_0", "gguf mxfp4"),
    *("uint4 g128 zero (AWQ, GPTQ)", "uint4 g32 f32 zero act-order", "int8 channel f32", "uint8 g32 zero"),
    *("uint3 g32 bf16 float zero", "uint2 g32 zero", "int5 g64", "int7 g16 f32 offset", "uint1 g64 zero"),
    *("int8 tensor", "e4m3 blocks", "e5m2 g64", "nf4 g64", "e2m3 g32 e8m0", "int4 channel, 83 columns"),
    *("e2m1 g16 e4m3 (NVFP4)", "e2m1 g16 e4m3, rows unlike (fused NVFP4)"),
]


@pytest.mark.parametrize("name", DECODED)
def test_a_few_tokens_meet_the_stored_numbers(name: str, device: torch.device) -> None:
    assert product(small(name), 1, device) < 1e-6
    assert product(small(name), 3, device) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 65, 128, 130])
@pytest.mark.parametrize("name", TAKEN)
def test_any_number_of_tokens(name: str, tokens: int, device: torch.device) -> None:
    weight = WEIGHTS[name]()
    if normal_form(weight).abs().max() > 1e6:
        pytest.skip("random bytes of this type decode to numbers no model has")
    assert product(weight, tokens, device) < 1e-6


KINDS = {
    "uint4 zero": lambda: canonical("uint4", 64, zero=True, shape=(37, 128)),
    "uint2 zero": lambda: canonical("uint2", 64, zero=True, shape=(37, 256)),
    "int4": lambda: canonical("int4", 32, shape=(37, 128)),
    "uint3 float zero": lambda: float_zero("uint3", 32, "f16"),
    "nf4": lambda: canonical("nf4", 64, "f32", shape=(37, 128)),
    "e4m3 blocks": lambda: canonical("e4m3", 64, "f32", block_rows=16, shape=(48, 128)),
    "q4_k": lambda: tensor_of("q4_k", random_blocks("q4_k", 37, 1)),
}


@pytest.mark.parametrize("tokens", [17, 64, 65, 129])
@pytest.mark.parametrize("name", ["uint4 zero", "q4_k"])
def test_more_tokens(name: str, tokens: int, device: torch.device) -> None:
    assert product(KINDS[name](), tokens, device) < 1e-6


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 65])
@pytest.mark.parametrize("name", ["uint3 float zero", "nf4", "uint4 zero", "q4_k", "uint2 zero", "int4"])
def test_other_types_of_x(name: str, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    assert product(KINDS[name](), tokens, device, dtype) < 1e-6


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("name", ["nf4", "e4m3 blocks"])
def test_many_tokens_meet_slices_of_rows(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.kernels.gpu.linear._WORKSPACE", 1)  # the least there is: 128 rows, here all
    weight = KINDS[name]()
    assert product(weight, 512, device, torch.float32) < 1e-6
    packed = BLOCKS.pack(weight, device)
    x = torch.randn(512, weight.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    found = BLOCKS.linear(x.to(device), packed)
    wanted = x.double() @ as_multiplied(weight, 512, torch.bfloat16).T
    assert found.dtype is torch.bfloat16
    assert ((found.cpu().double() - wanted).norm() / wanted.norm()) < 2**-8


@pytest.mark.usefixtures("floats")
def test_slices_of_rows_join(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.kernels.gpu.linear._WORKSPACE", 1)
    assert product(canonical("int4", 16, shape=(300, 32)), 512, device, torch.float32) < 1e-6


IN_WORDS = [
    ("uint4", 128),
    ("uint2", 64),
    ("int8", 0),
    ("uint3", 64),
    ("uint5", 32),
    ("int6", 16),
    ("int7", 32),
]
IN_WORDS += [("e2m1", 32), ("e4m3", 0)]


@pytest.mark.parametrize(("codes", "group"), IN_WORDS)
@pytest.mark.parametrize("power", [-30, 50])
def test_one_tokens_numbers_may_be_small_or_large(
    codes: str, group: int, power: int, device: torch.device
) -> None:
    """Codes are read as subnormal numbers: x and scales take their units off, and lose nothing."""
    weight = canonical(codes, group, zero=codes.startswith("uint"), shape=(37, 384))
    packed = BLOCKS.pack(weight, device)
    x = torch.randint(-100, 100, (1, weight.shape[1]), generator=torch.Generator().manual_seed(2)).bfloat16()
    with runtime.recording() as launches:
        found = BLOCKS.linear((x * 2.0**power).to(device), packed)
    assert launches[0].function == "word_product"
    assert torch.equal(found, BLOCKS.linear(x.to(device), packed) * 2.0**power) and found.any()


@pytest.mark.parametrize("code", [127, 255])
def test_one_token_meets_a_code_that_is_no_number(code: int, device: torch.device) -> None:
    weight = canonical("e4m3", 0, shape=(37, 384))
    weight.codes[5, 203] = code
    with runtime.recording() as launches:
        found = BLOCKS.linear(
            torch.ones(1, 384, dtype=torch.bfloat16, device=device), BLOCKS.pack(weight, device)
        )
    assert launches[0].function == "word_product"
    assert found[0, 5].isnan() and int(found.isnan().sum()) == 1


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "wanted"),
    [
        (4096, 4096, 512, 4096),
        (4096, 14336, 512, 4096),  # 32 MiB would be 1,152 rows: 20 tiles on 132 SMs
        (28672, 4096, 512, 7168),  # 33 tiles of 256 rows are asked for, in slices alike
        (28672, 4096, 8192, 4096),
        (8192, 28672, 512, 4096),  # all of it would be 448 MiB
        (8192, 28672, 8192, 768),
        (100, 64, 512, 128),
    ],
)
def test_a_slice_occupies_all_processors(rows: int, columns: int, tokens: int, wanted: int) -> None:
    found = slice_rows(rows, columns * 2, tokens, 132)
    assert found == wanted and found % 128 == 0
    assert found * columns * 2 <= MOST_SLICE


@pytest.mark.parametrize(("tokens", "height"), [(1, 128), (1, 32), (2, 128), (2, 64)])
def test_split_columns_are_added_in_order(
    tokens: int, height: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.kernels.gpu.linear.cut", lambda *_: Cut(height, 3, 1))
    weight = canonical("uint4", 128, zero=True, order=True, shape=(37, 384))
    with runtime.recording() as launches:
        assert product(weight, tokens, device) < 1e-6
    assert dict(launches[-1].constants)["SPLIT"], "the last program of each tile adds"
    packed = BLOCKS.pack(weight, device)
    x = torch.randn(tokens, 384, device=device).bfloat16()
    assert torch.equal(BLOCKS.linear(x, packed), BLOCKS.linear(x, packed))
    assert not gpu_kernel._zeros(device).any(), "nothing is left of the counts"
    wide = torch.full((tokens, 50), 7.0, dtype=torch.bfloat16, device=device)
    BLOCKS.linear(x, packed, wide[:, 5:42])
    assert torch.equal(wide[:, 5:42], BLOCKS.linear(x, packed))
    assert (wide[:, :5] == 7).all() and (wide[:, 42:] == 7).all()


def test_an_infinite_part_of_split_columns_is_infinite(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is that of the program which adds."""
    packed = BLOCKS.pack(canonical("uint4", 128, zero=True, shape=(37, 384)), device)
    x = torch.zeros(2, 384)
    x[1, 383] = 3e38
    found = []
    for splits in (1, 3):
        monkeypatch.setattr("lowbit.kernels.gpu.linear.cut", lambda *_, n=splits: Cut(64, n, 3 // n))
        found.append(BLOCKS.linear(x.bfloat16().to(device), packed, torch.empty(2, 37, device=device)))
    assert found[0].isinf().any()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(3, 2, 700), (4, 513), (2, 1, 3, 5)])
def test_ranks_parts_are_added_in_their_order(shape: tuple[int, ...], device: torch.device) -> None:
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 1e3
    wanted = parts[0].clone()
    for part in parts[1:]:
        wanted += part
    with runtime.recording() as launches:
        found = parallel._added(parts.to(device))
    assert torch.equal(found.cpu(), wanted) and [one.function for one in launches] == ["add_splits"]


def test_float32_is_rounded_in_the_interpreter_alone(device: torch.device) -> None:
    packed = BLOCKS.pack(KINDS["uint4 zero"](), device)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)).to(device)
    found, rounded = BLOCKS.linear(x, packed), BLOCKS.linear(x.bfloat16().float(), packed)
    assert found.dtype is torch.float32
    assert torch.equal(found, rounded) == (device.type == "cpu")


def test_no_tokens_and_no_rows(device: torch.device) -> None:
    packed = BLOCKS.pack(KINDS["nf4"](), device)
    assert BLOCKS.linear(torch.empty(0, 128, device=device), packed).shape == (0, 37)
    assert BLOCKS.rows(packed, torch.empty(0, dtype=torch.int64, device=device)).shape == (0, 128)
    with pytest.raises(LowbitError, match="127 columns, weight 128"):
        BLOCKS.linear(torch.ones(1, 127, device=device), packed)


def every_code(fmt: str, scale: str) -> QuantizedTensor:
    """All codes of an 8-bit format in a row, or 16 of them under every scale of another."""
    rows, columns = (1, 256) if scale == "f32" else (256, 16)
    codes = torch.arange(columns, dtype=torch.uint8).expand(rows, columns).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    stored = torch.ones(1, 1) if scale == "f32" else scales.view(number_format(scale).dtype)
    scheme = Scheme(number_format(fmt), ((1, 0),), (number_format(scale),))
    return QuantizedTensor(scheme, (rows, columns), codes, (stored,), origin="test")


@pytest.mark.parametrize(
    ("fmt", "scale"),
    [(fmt, "f32") for fmt in ("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "int8")]
    + [("uint8", "e8m0"), ("uint8", "e4m3")],
)
@pytest.mark.filterwarnings("ignore:.* encountered in multiply")
def test_every_code_is_worth_what_its_format_says(fmt: str, scale: str, device: torch.device) -> None:
    """Infinities, NaNs and subnormal numbers included."""
    weight = every_code(fmt, scale)
    ids = torch.arange(weight.shape[0], device=device)
    found = BLOCKS.rows(BLOCKS.pack(weight, device), ids).cpu()
    assert torch.equal(found.nan_to_num(nan=12345.0), weight.dequantize().nan_to_num(nan=12345.0))


def flattened(columns: int, block: int) -> QuantizedTensor:
    weight = canonical("nf4", 16, "f32", shape=(40, columns))
    scheme = replace(weight.scheme, blocks=((1, block),), flattened=True)
    scales = torch.randn(-(-40 * columns // block), generator=torch.Generator().manual_seed(1))
    return replace(weight, scheme=scheme, scales=(scales,))


@pytest.mark.parametrize(("columns", "block"), [(48, 64), (128, 64), (64, 256)])
def test_flattened_blocks_may_cross_rows(columns: int, block: int, device: torch.device) -> None:
    weight = flattened(columns, block)
    packed = BLOCKS.pack(weight, device)
    assert torch.equal(BLOCKS.unpack(packed).dequantize().cpu(), weight.dequantize())
    rows = BLOCKS.rows(packed, torch.arange(40, device=device))
    torch.testing.assert_close(rows.cpu(), weight.dequantize(), rtol=1e-6, atol=0)
    assert product(weight, 1, device) < 1e-6 and product(weight, 2, device) < 1e-6


def test_rows_past_two_to_the_31(device: torch.device) -> None:
    """The last rows of a weight of 2.2e9 codes; the rest are holes in memory."""
    if device.type == "cuda":
        pytest.skip("holes are the CPU's")
    small = canonical("uint8", 0, "f32", zero=True, shape=(16, 2048))
    packed, rows = BLOCKS.pack(small, device), (1 << 20) + 16
    buffers = {"codes": sparse_zeros((rows, 2048), torch.int8)}
    buffers["codes"][-16:] = packed.buffers["codes"]
    for name in ("scale0", "zeros"):
        buffers[name] = packed.buffers[name].repeat(rows // 16, 1)
    large = BLOCKS.restore(small.scheme, (rows, 2048), buffers, "test")
    ids = torch.arange(rows - 16, rows)
    assert torch.equal(BLOCKS.rows(large, ids), small.dequantize())


def test_refusals_name_the_reason(device: torch.device) -> None:
    weight = canonical("int4", 32)
    for name in NARROW:
        narrow = WEIGHTS[name]()
        reason = BLOCKS.refuses(narrow.scheme, narrow.shape, device)
        wanted = r"needs (groups|rows and blocks) of a multiple of 16 columns, got (8|1|24|40|56)"
        wanted += r"|the rows of a block lie apart|some weights have outliers"
        wanted += r"|(r?vq|trellis|e8p)[\w+/.]* codes have no packed form"
        assert reason is not None and re.fullmatch(wanted, reason)

    def reason(**changes: object) -> str:
        return str(BLOCKS.refuses(replace(weight.scheme, **changes), weight.shape, device))  # type: ignore[arg-type]

    assert "experts" in str(BLOCKS.refuses(weight.scheme, (4, *weight.shape), device))
    assert "quantizes its input" in reason(activation=ActivationScheme(number_format("int8"), (1, 0)))
    assert "float zero points with e8m0" in reason(zero="float", scales=(number_format("e8m0"),))
    assert "3 levels" in reason(blocks=((1, 32),) * 3, scales=weight.scheme.scales * 3)
    assert "not quantized" in str(BLOCKS.refuses(dense("bf16"), (8, 32), device))
    assert "no packed form" in reason(weight=number_format("e8m0"))
    assert "rows and blocks" in str(BLOCKS.refuses(flattened(40, 64).scheme, (40, 40), device))
    assert "quantized" in str(DENSE.refuses(weight.scheme, weight.shape, device))
    assert "experts" in str(DENSE.refuses(dense("f32"), (2, 8, 8), device))


def test_they_are_chosen_here_and_nowhere_else(device: torch.device) -> None:
    weight = canonical("int4", 32)
    assert choose(weight.scheme, weight.shape, device).kernel.name == "gpu_blocks"
    assert choose(dense("bf16"), (8, 32), device).kernel.name == "gpu_dense"
    runtime._state["interpreting"] = False
    cpu = torch.device("cpu")
    assert BLOCKS.refuses(weight.scheme, weight.shape, cpu) == "needs an NVIDIA GPU, got cpu"
    assert DENSE.refuses(dense("bf16"), (8, 32), cpu) == "needs an NVIDIA GPU, got cpu"
    narrow = canonical("e8m0", 64)
    choice = choose(narrow.scheme, narrow.shape, cpu)
    assert not [name for name, _ in choice.refusals if name.startswith("gpu")]


def test_buffers_that_cannot_be_the_weights(device: torch.device) -> None:
    packed = BLOCKS.pack(canonical("uint3", 32, zero=True, order=True), device)
    for name, damage in (
        ("plane2", lambda b: b[:-1]),
        ("scale0", lambda b: b[:, :-1]),
        ("zeros", lambda b: b[:0]),
        ("column_order", lambda b: b + 1),
    ):
        with pytest.raises(ValueError, match=r"^test: "):
            damaged = packed.buffers | {name: damage(packed.buffers[name])}
            BLOCKS.restore(packed.scheme, packed.shape, damaged, packed.origin)
    with pytest.raises(ValueError, match="plane1 is missing"):
        lacking = {name: buffer for name, buffer in packed.buffers.items() if name != "plane1"}
        BLOCKS.restore(packed.scheme, packed.shape, lacking, packed.origin)


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bf16", "f16", "f32"])
def test_dense_weights(
    name: str, x_dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.kernels.gpu.linear._WORKSPACE", 4000)  # a few rows at once where types differ
    weight = dense_weight(name, (37, 83))
    packed = DENSE.pack(weight, device)
    assert packed.nbytes == DENSE.nbytes(weight.scheme, weight.shape)
    assert torch.equal(DENSE.unpack(packed).codes.cpu(), weight.codes)
    again = DENSE.restore(weight.scheme, weight.shape, packed.buffers, "test")
    ids = torch.tensor([3, 36, 0], dtype=torch.int32, device=device)
    assert torch.equal(DENSE.rows(again, ids).cpu(), weight.dequantize()[ids.cpu().long()])
    x = torch.randn(5, 83, generator=torch.Generator().manual_seed(1)).to(x_dtype)
    wanted = x.double() @ weight.dequantize().double().T
    found = DENSE.linear(x.to(device), again)
    assert found.dtype is x_dtype
    narrow = x_dtype is torch.bfloat16
    assert (found.cpu().double() - wanted).norm() / wanted.norm() < (2**-8 if narrow else 1e-6)
    out = torch.full((5, 40), torch.nan, device=device)
    DENSE.linear(x.to(device), again, out[:, :37])
    assert (out[:, :37].cpu().double() - wanted).norm() / wanted.norm() < (2**-8 if narrow else 1e-6)
    assert out[:, 37:].isnan().all()
    with pytest.raises(ValueError, match=r"^test: torch.* instead of "):
        DENSE.restore(weight.scheme, (37, 82), packed.buffers, "test")
