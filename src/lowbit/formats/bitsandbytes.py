"""bitsandbytes checkpoints: nf4 and fp4 (QLoRA: Dettmers et al., 2023), LLM.int8 (Dettmers et al., 2022).

4 bits. The weight is flattened row by row; byte k holds code 2k in its *high*, 2k+1 in its low nibble:

    X.weight                 U8 [ceil(n / 2), 1]    (or the same bytes as BF16, F32 … : quant_storage)
    X.weight.absmax          F32 [blocks], or U8 where it is quantized itself
    X.weight.quant_map       F32 [16]: the value of each code
    X.weight.nested_absmax, X.weight.nested_quant_map: the second level
    X.weight.quant_state.bitsandbytes__nf4   U8: JSON with blocksize, shape, nested_offset …

    weight.flat[i] = quant_map[code_i] * absmax[i // blocksize]
    absmax[j] = nested_quant_map[u8_j] * nested_absmax[j // nested_blocksize] + nested_offset

Blocks run over the flat tensor and may cross rows; where a row is whole blocks they are plain 1 x blocksize.
The second level is undone into float32 scales in the tool's own order of operations, so nothing is lost. The
tool's fp4 table has +0 as code 8 where ours, by its sign bit, has -0: equal numbers, and no other difference
between the file's table and ours is accepted.

int8: ``weight`` I8 [out, in], ``SCB`` F32 [out] (a row's largest |w|): weight * SCB / 127. The tool computes
(weight * SCB) * 0.007874015718698502 in float32; one scale a row, SCB * 0.00787…, is the nearest float32 for
it: at most 2 units of the last bit apart in float32, 1 in float16 (where 4 of 100,000 values differ at all).
``llm_int8_threshold``: columns of the input with a number of at least that size are not rounded.

GPTQModel writes the same under names of its own: ``weight_absmax``, ``weight_quant_state`` and so on, of which
type the config's ``format`` says, and ``weight_scb``; it rounds every column.

Which modules are quantized the tensors say, not ``llm_int8_skip_modules``. Plain floats under these keys were
to be quantized at load; they are read plain, with a warning. Refused: column-tiled int8 (``weight_format``
other than 0, before 0.42), other code tables (af4, int4), packed stacks of experts (the tool leaves stacks in
floats). Where a row is no whole blocks the tool's 4-bit CPU kernel (0.50.2) disagrees with what it wrote; its
plain torch code and the definition above agree.
"""

from __future__ import annotations

import json
import math
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredModule, check_shape, entry_of, finite_scales
from lowbit.formats.dense import origin_of
from lowbit.formats.partly_dense import PartlyDense
from lowbit.formats.quantization_config import claimed_config, quantization_config
from lowbit.numerics.llm_int8 import INT8_STEP, llm_int8_inputs
from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_STATE = ".quant_state.bitsandbytes__"
_GPTQMODELS = (".weight_quant_state", ".weight_scb")
FOUR_BIT_KINDS = {"nf4": "nf4", "fp4": "fp4_bnb"}
_STORAGE = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}


class BitsAndBytes(PartlyDense):
    """See the module docstring."""

    name: ClassVar[str] = "bitsandbytes"
    aliases = ("bnb",)
    reference: ClassVar[str] = "bitsandbytes"
    unused: ClassVar[tuple[str, ...]] = (r".*\.weight_format",)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        found = claimed_config(header)
        self.values, self.place = found.values, found.place
        self.by_gptqmodel = any(name.endswith(_GPTQMODELS) for name in header.tensors)
        threshold = 0.0 if self.by_gptqmodel else self.values.get("llm_int8_threshold", 6.0)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1e6:
            raise LowbitError(
                "E0212",
                f"{self.place}.llm_int8_threshold must be a number from 0, found "
                f"{printable(repr(threshold))}",
            )
        self.threshold = float(threshold)
        self.states = _states(header)
        self.kinds = {self._kind_of_state(name) for name in self.states.values()}
        self.kinds |= {"int8" for name in header.tensors if name.endswith((".SCB", ".weight_scb"))}
        self._compare(_kind_in_config(self.values, self.place))

    def _compare(self, said: str | None) -> None:
        """E0214 where the config says another kind than the tensors, which win."""
        header = self.header
        if self.kinds:
            if said is not None and said not in self.kinds:
                self.notes.contradiction(
                    "E0214",
                    f"{header.root.name}: {self.place} says {said} but the tensors are "
                    f"{' and '.join(sorted(self.kinds))}; reading what the tensors say",
                )
        elif not any(
            name.endswith(".absmax") or (name.endswith(".weight") and entry.dtype in ("I8", "U8"))
            for name, entry in header.tensors.items()
        ):
            self.notes.contradiction(
                "E0214",
                f"{header.root.name}: {self.place} says bitsandbytes but every tensor is plain; reading it "
                "as an unquantized model",
            )

    @classmethod
    def claims(cls, header: CheckpointHeader) -> str | None:
        """quant_method bitsandbytes, or load_in_4bit / load_in_8bit without a method."""
        found = quantization_config(header)
        if found is None or not found.method.lower().startswith("bitsandbytes"):
            return None
        return f"{found.place} says {found.method}"

    def describe(self) -> str:
        """The kinds that are there."""
        file = self.place.split(":")[0]
        if not self.kinds:
            return f"bitsandbytes in {file}, weights not quantized"
        return f"bitsandbytes, {' and '.join(sorted(self.kinds))} in {file}"

    def _is_dense(self, module: StoredModule) -> bool:
        return self._kind(module) == "dense"

    def _scheme(self, module: StoredModule) -> Scheme:
        """From the tensors that are there and their shapes."""
        kind = self._kind(module)
        if kind == "int8":
            return self._int8_scheme()
        return _four_bit_scheme(kind, module.shape, self._block_size(module))

    def _tensors(self, module: StoredModule) -> list[str]:
        """The weight and everything its state is made of."""
        tensors, weight = self.header.tensors, module.tensor("weight")
        if self._kind(module) == "int8":
            own = [self._scb(module), module.tensor("weight_format")]
        else:
            parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            own = [*(f"{weight}{self._joint}{part}" for part in parts), self.states[weight]]
        return [weight, *(name for name in own if name in tensors)]

    def _weight(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        """Codes and scales, double quantization taken apart."""
        kind = self._kind(module)
        return self._int8(module, data) if kind == "int8" else self._four_bit(module, data, kind)

    def _kind(self, module: StoredModule) -> str:
        """nf4, fp4, int8 or dense, from the names that are there."""
        name, tensors = module.tensor("weight"), self.header.tensors
        weight, state = tensors.get(name), self.states.get(name)
        odd = weight is not None and weight.dtype in ("I8", "U8")
        if module.expert is not None:
            if odd or state is not None or f"{name}.absmax" in tensors:
                raise LowbitError(
                    "E0218",
                    f"{self.header.file_of(name)}: {name!r} is a stack of experts packed by bitsandbytes, "
                    "which is not read; use a version with one module for each expert",
                )
            return "dense"
        if state is not None:
            kind = self._kind_of_state(state)
            if kind not in FOUR_BIT_KINDS:
                raise LowbitError(
                    "E0218",
                    f"{self.header.file_of(state)}: tensor {printable(repr(state))} says "
                    f"{printable(kind)}; the 4-bit types that are read are {' and '.join(FOUR_BIT_KINDS)}",
                )
            return kind
        if self._scb(module) in tensors:
            return "int8"
        if f"{name}.absmax" in tensors or (weight is not None and weight.dtype == "U8"):
            raise LowbitError(
                "E0209",
                f"{self.header.root.name}: no file contains '{name}{_STATE}nf4' or '…__fp4', the state of a "
                "4-bit bitsandbytes weight",
            )
        if odd:
            entry_of(self.header, module, "SCB", ("F32",), "the row scales of an int8 bitsandbytes weight")
        return "dense"

    @property
    def _joint(self) -> str:
        """What stands between a weight's name and that of a part."""
        return "_" if self.by_gptqmodel else "."

    def _scb(self, module: StoredModule) -> str:
        return module.tensor("weight_scb" if self.by_gptqmodel else "SCB")

    def _kind_of_state(self, name: str) -> str:
        return str(self.values.get("format")) if self.by_gptqmodel else name.rpartition("__")[2]

    # ---- 4 bits

    def _block_size(self, module: StoredModule) -> int:
        """Weights of a block, from the number of scales: the header says enough without reading the state."""
        self._packed(module)
        absmax = self._part(module, "absmax", ("F32", "U8"))
        count = math.prod(module.shape)
        for size in (64, 128, 256, 512, 1024, 2048, 4096, 32, 16):
            if absmax.shape == (-(-count // size),):
                return size
        raise LowbitError(
            "E0213",
            f"{absmax.file.name}: tensor {absmax.name!r} is {list(absmax.shape)}; {count} weights in "
            f"blocks of 64 have [{-(-count // 64)}]. The packing does not match the model's shape "
            f"{list(module.shape)}",
        )

    def _packed(self, module: StoredModule) -> TensorEntry:
        """The packed weight, its size checked."""
        weight = entry_of(self.header, module, "weight", tuple(_STORAGE), "a 4-bit bitsandbytes weight")
        count, unit = math.prod(module.shape), _STORAGE[weight.dtype]
        need = -(-count // 2)
        if weight.nbytes != -(-need // unit) * unit:
            raise LowbitError(
                "E0213",
                f"{weight.file.name}: tensor {weight.name!r} has {weight.nbytes} bytes; {count} 4-bit "
                f"weights need {need}. The packing does not match the model's shape {list(module.shape)}",
            )
        return weight

    def _part(self, module: StoredModule, part: str, dtypes: tuple[str, ...]) -> TensorEntry:
        named = f"weight{self._joint}{part}"
        return entry_of(self.header, module, named, dtypes, "a 4-bit bitsandbytes weight")

    def _four_bit(self, module: StoredModule, data: TensorData, kind: str) -> QuantizedTensor:
        state = self.header.tensors[self.states[module.tensor("weight")]]
        said = _state(state, data)
        out, columns = module.shape
        count = out * columns
        if said.get("shape") != [out, columns]:
            raise LowbitError(
                "E0210",
                f"{state.file.name}: {state.name!r} says the weight is "
                f"{printable(repr(said.get('shape')))} but the config asks for {[out, columns]}; config and "
                "weights are from different models",
            )
        size = self._block_size(module)
        if said.get("blocksize") != size and count > size:
            raise LowbitError(
                "E0213",
                f"{state.file.name}: {state.name!r} says blocksize {printable(repr(said.get('blocksize')))}, "
                f"absmax has blocks of {size}; the file is damaged",
            )
        self._check_map(module, data, number_format(FOUR_BIT_KINDS[kind]))
        weight = self._packed(module)
        raw = data.raw(weight.name)[: -(-count // 2)]
        codes = torch.stack((raw >> 4, raw & 15), 1).flatten()[:count].view(out, columns)
        absmax = self._absmax(module, data, said, -(-count // size))
        scheme = _four_bit_scheme(kind, module.shape, size)
        if not scheme.flattened:
            absmax = absmax.view(out, -1)
        return QuantizedTensor(scheme, module.shape, codes, (absmax,), origin=origin_of(self.header, module))

    def _check_map(self, module: StoredModule, data: TensorData, fmt: NumberFormat) -> None:
        entry = self._part(module, "quant_map", ("F32",))
        check_shape(entry, (16,), "a 4-bit bitsandbytes weight")
        stored, known = data.tensor(entry.name), fmt.table()
        if not torch.equal(stored, known):
            code = int((stored != known).nonzero()[0])
            raise LowbitError(
                "E0218",
                f"{entry.file.name}: tensor {entry.name!r} gives code {code} the value "
                f"{float(stored[code]):.9g}, {fmt.name} has {float(known[code]):.9g}; other code tables "
                "are not read",
            )

    def _absmax(self, module: StoredModule, data: TensorData, said: dict[str, object], blocks: int) -> Tensor:
        """float32 (blocks,), the second level of quantization undone as the tool does."""
        entry = self._part(module, "absmax", ("F32", "U8"))
        absmax = data.tensor(entry.name)
        if entry.dtype == "F32":
            return finite_scales(self.header, entry.name, absmax)
        outer = self._part(module, "nested_absmax", ("F32",))
        table = self._part(module, "nested_quant_map", ("F32",))
        check_shape(table, (256,), "a doubly quantized bitsandbytes weight")
        size, offset = said.get("nested_blocksize"), said.get("nested_offset")
        if not isinstance(size, int) or size <= 0 or not isinstance(offset, float):
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: the state of {module.stored!r} lacks nested_blocksize or nested_offset",
            )
        check_shape(outer, (-(-blocks // size),), "a doubly quantized bitsandbytes weight")
        steps = finite_scales(self.header, table.name, data.tensor(table.name))[absmax.long()]
        scales = finite_scales(self.header, outer.name, data.tensor(outer.name))
        spread = scales.repeat_interleave(min(size, blocks))[:blocks]  # a file may claim any block size
        return finite_scales(self.header, entry.name, steps * spread + offset)

    # ---- int8

    def _int8_scheme(self) -> Scheme:
        inputs = llm_int8_inputs(self.threshold)
        return Scheme(number_format("int8"), ((1, 0),), (number_format("f32"),), activation=inputs)

    def _int8(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        what = "an int8 bitsandbytes weight"
        weight = entry_of(self.header, module, "weight", ("I8",), what)
        check_shape(weight, module.shape, what)
        suffix = self._scb(module).removeprefix(f"{module.stored}.")
        scb = entry_of(self.header, module, suffix, ("F32", "F16", "BF16"), what)
        check_shape(scb, module.shape[:1], what)
        layout = self.header.tensors.get(module.tensor("weight_format"))
        if layout is not None and data.raw(layout.name).any():
            raise LowbitError(
                "E0218",
                f"{layout.file.name}: tensor {layout.name!r} says the weight is column-tiled for one GPU "
                "generation; save the model again with bitsandbytes 0.42 or newer",
            )
        scales = finite_scales(self.header, scb.name, data.tensor(scb.name)).float() * INT8_STEP
        codes = data.tensor(weight.name).view(torch.uint8) ^ 0x80  # two's complement to offset binary
        return QuantizedTensor(
            self._int8_scheme(),
            module.shape,
            codes,
            (scales.view(-1, 1),),
            origin=origin_of(self.header, module),
        )


def _kind_in_config(values: dict[str, object], place: str) -> str | None:
    """nf4, fp4 or int8 as the config has it, or None where it does not say."""
    four, eight = bool(values.get("load_in_4bit")), bool(values.get("load_in_8bit"))
    if four and eight:
        raise LowbitError("E0212", f"{place} has both load_in_4bit and load_in_8bit; a model is one of them")
    if not four:
        return "int8" if eight else None
    kind = values.get("bnb_4bit_quant_type", "fp4")  # the tool's default
    if kind not in tuple(FOUR_BIT_KINDS):
        raise LowbitError(
            "E0212",
            f"{place}.bnb_4bit_quant_type must be {' or '.join(FOUR_BIT_KINDS)}, found "
            f"{printable(repr(kind))}",
        )
    return str(kind)


def _states(header: CheckpointHeader) -> dict[str, str]:
    """Weight name -> name of the tensor that holds its state."""
    states: dict[str, str] = {}
    for name in header.tensors:
        weight, mark, _ = name.partition("_quant_state" if name.endswith(_GPTQMODELS[0]) else _STATE)
        if mark and states.setdefault(weight, name) != name:
            raise LowbitError(
                "E0213",
                f"{header.file_of(name)}: {weight!r} has two states, {printable(repr(states[weight]))} and "
                f"{printable(repr(name))}; the file is damaged",
            )
    return states


def _four_bit_scheme(kind: str, shape: tuple[int, int], size: int) -> Scheme:
    flattened = shape[1] % size != 0
    return Scheme(
        number_format(FOUR_BIT_KINDS[kind]), ((1, size),), (number_format("f32"),), flattened=flattened
    )


def _state(entry: TensorEntry, data: TensorData) -> dict[str, object]:
    if entry.dtype != "U8" or entry.nbytes > 1 << 16:
        raise LowbitError(
            "E0213",
            f"{entry.file.name}: {entry.name!r} is {entry.dtype} of {entry.nbytes} bytes; a state is a short "
            "JSON text as U8",
        )
    try:
        said = json.loads(bytes(data.raw(entry.name).numpy()).decode("utf-8"))
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise LowbitError(
            "E0213", f"{entry.file.name}: {entry.name!r} is no JSON object; the file is damaged"
        )
    return said


FORMAT = BitsAndBytes
