"""What all writers are tested with: cruel weights, and fixtures read, written and read again."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from formats.helpers import FIXTURES, reader_of, write_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import InputRule, StoredLinear, StoredModule
from lowbit.formats.writing import CheckpointWriter
from lowbit.loading.source_modules import SourceModel
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

TYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
}


def scheme(
    codes: str,
    *blocks: tuple[int, int],
    scales: str = "f16",
    zero: bool = False,
    activation: ActivationScheme | None = None,
    **more: bool,
) -> Scheme:
    """``scheme("uint4", (1, 32), zero=True)``; ``scales``: one name a level, separated by blanks."""
    formats = tuple(number_format(name) for name in scales.split())
    return Scheme(
        number_format(codes), blocks, formats, "integer" if zero else "none", activation=activation, **more
    )


def cruel(made: Scheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    """Random codes of all values; every block its own scale, zero point and place."""
    random = torch.Generator().manual_seed(seed)
    bits = int(made.weight.bits)
    codes = torch.randint(0, 1 << bits, shape, generator=random, dtype=torch.uint8)
    if made.weight.name == "e4m3":
        codes[(codes & 127) == 127] ^= 1  # no NaN
    levels = []
    for (rows, columns), scale in zip(made.blocks, made.scales, strict=True):
        grid = (-(-shape[0] // (rows or shape[0])), -(-shape[1] // (columns or shape[1])))
        if made.flattened:
            grid = (-(-shape[0] * shape[1] // columns),)
        values = torch.rand(grid, generator=random) + 0.25
        if scale.name == "e8m0":
            values = torch.randint(100, 140, grid, generator=random).to(torch.uint8).view(TYPES["e8m0"])
        levels.append(values if values.dtype == TYPES["e8m0"] else values.to(TYPES[scale.name]))
    zeros = None
    offsets = tuple(torch.randn(scale.shape, generator=random).to(scale.dtype) for scale in levels)
    if made.zero == "float":
        zeros = (torch.randn(levels[0].shape, generator=random) * (1 << bits)).to(levels[0].dtype)
    if made.zero == "integer":
        zeros = torch.randint(0, 1 << bits, levels[0].shape, generator=random, dtype=torch.uint8)
    order = torch.randperm(shape[1], generator=random) if made.reordered else None
    if order is not None:  # as readers have it: within a group the columns ascend
        group = made.blocks[0][1] or shape[1]
        order = torch.cat([part.sort().values for part in order.split(group)])
    groups = torch.arange(shape[0]) % len(levels[-1]) if made.scattered else None
    offsets = offsets if made.offset else ()
    return QuantizedTensor(made, shape, codes, tuple(levels), zeros, offsets, order, row_groups=groups)


def same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    """Equal in every part, scales bit for bit."""
    assert a.shape == b.shape and a.scheme.weight == b.scheme.weight and a.scheme.blocks == b.scheme.blocks
    assert a.scheme == b.scheme, f"{a.scheme} != {b.scheme}"
    assert torch.equal(a.codes, b.codes), f"codes of {a.scheme}"
    for one, other in zip((*a.scales, *a.offsets), (*b.scales, *b.offsets), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, f"{one.dtype} {other.dtype}"
        assert torch.equal(_bytes(one), _bytes(other))
    pairs = (a.zeros, b.zeros), (a.column_order, b.column_order), (a.row_groups, b.row_groups)
    for one, other in pairs:
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one.double(), other.double())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def written(
    folder: Path, kind: type[CheckpointWriter], modules: dict[str, StoredLinear], plain: Iterable[str] = ()
) -> Path:
    """A folder with these modules, written by ``kind``, and some plain ones."""
    schemes = {name: linear.weight.scheme for name, linear in modules.items()}
    dense = Scheme(number_format("bf16"))
    writer = kind(schemes | dict.fromkeys(plain, dense))
    tensors: dict[str, Tensor] = {}
    metadata = writer.metadata()
    for name, linear in modules.items():
        out, columns = linear.weight.shape
        module = StoredModule(name, name, (out, columns))
        metadata |= writer.description(module)
        tensors |= writer.write(module, linear.weight, linear.bias, linear.input)
    for name in plain:
        tensors[f"{name}.weight"] = torch.ones(8, 64, dtype=torch.bfloat16)
    return write_folder(folder, tensors, writer.quantization_config(), metadata)


def round_trip(folder: Path, kind: type[CheckpointWriter], modules: dict[str, StoredLinear]) -> None:
    """What is read back is what was written, and strictly: without one contradiction."""
    reader = reader_of(written(folder, kind, modules, ("lm_head",)), strict=True)
    with TensorData(open_checkpoint(str(folder))) as data:
        for name, linear in modules.items():
            out, columns = linear.weight.shape
            module = StoredModule(name, name, (out, columns))
            found = reader.read(module, data)
            same(found.weight, linear.weight)
            # Zero points all in the middle are written, and only the data show that they are.
            assert reader.scheme_of(module) == linear.weight.scheme or found.weight.zeros is None
            assert (found.bias is None) == (linear.bias is None)
            assert found.bias is None or torch.equal(found.bias, linear.bias)
            _same_input(found.input, linear.input)
        plain = StoredModule("lm_head", "lm_head", (8, 64))
        assert reader.read(plain, data).weight.scheme.is_dense


def _same_input(a: InputRule | None, b: InputRule | None) -> None:
    for name in ("multiplier", "static_scale", "static_zero"):
        one, other = getattr(a, name, None), getattr(b, name, None)
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one.float().reshape(-1), other.float().reshape(-1)), name


@cache
def whole_model(path: Path) -> SourceModel | None:
    """A fixture's folder or file; None: not a whole model. Opened once a process."""
    try:
        return SourceModel(open_checkpoint(str(path)))
    except LowbitError:
        return None


def source_of(path: Path) -> SourceModel | None:
    """A fixture's folder or file; None: not a whole model with quantized weights."""
    source = whole_model(path)
    quantized = source is not None and any(not module.scheme.is_dense for module in source.modules)
    return source if quantized else None


def fixtures_it_takes(kind: type[CheckpointWriter], *groups: str) -> list[Path]:
    """Fixture folders, whole models, of which the writer refuses no module."""
    found = []
    for path in sorted(about for group in groups for about in FIXTURES.glob(f"{group}/*/about.json")):
        source = source_of(path.parent)
        if source is not None and not any(
            kind.refuses_to_write(m.scheme, m.target.shape) or m.target.expert for m in source.modules
        ):
            found.append(path.parent)
    return found


def convert_and_compare(folder: Path, form: str, out: Path) -> None:
    """Convert a fixture; every module of the result, read strictly, is the source's."""
    from lowbit.loading.convert import convert

    before = whole_model(folder)
    assert before is not None
    convert(before.header, form, out)
    after = SourceModel(open_checkpoint(str(out)), strict=True)
    assert after.form.name == form
    with TensorData(before.header) as old, TensorData(after.header) as new:
        assert [m.target.name for m in before.modules] == [m.target.name for m in after.modules]
        for one, other in zip(before.modules, after.modules, strict=True):
            a, b = before.read(one, old), after.read(other, new)
            if b.weight.scheme.is_dense and not a.weight.scheme.is_dense:  # an embedding, spelled out
                assert torch.equal(a.weight.dequantize(), b.weight.dequantize())
                continue
            if a.weight.scheme.reordered or a.weight.scheme.blocks != b.weight.scheme.blocks:
                # Another order within a group, or a group as wide as its row: the numbers are the same.
                assert torch.equal(a.weight.dequantize(), b.weight.dequantize())
            else:
                same(a.weight, b.weight)
            assert (a.bias is None) == (b.bias is None)
            _same_input(a.input, b.input)
