"""bitsandbytes checkpoints: nf4 and fp4 (QLoRA: Dettmers et al., 2023), LLM.int8 (Dettmers et al., 2022).

4 bits. The weight is flattened row by row; byte k holds code 2k in its *high*, 2k+1 in its low nibble:

    X.weight                 U8 [ceil(n / 2), 1]    (or the same bytes as BF16, F32 … : quant_storage)
    X.weight.absmax          F32 [blocks], or U8 where it is quantized itself
    X.weight.quant_map       F32 [16]: the value of each code
    X.weight.nested_absmax, X.weight.nested_quant_map: the second level
    X.weight.quant_state.bitsandbytes__nf4   U8: JSON with blocksize, shape, nested_offset …

    weight.flat[i] = quant_map[code_i] * absmax[i // blocksize]
    absmax[j] = nested_quant_map[u8_j] * nested_absmax[j // 256] + nested_offset

Blocks run over the flat tensor and may cross rows; where a row is whole blocks they are plain 1 x blocksize.

int8: ``weight`` I8 [out, in], ``SCB`` F32 [out] (a row's largest |w|): weight * SCB / 127. Inputs of at
least ``llm_int8_threshold`` stay in full precision. Column-tiled layouts (``weight_format`` other than 0) are
refused. A checkpoint of plain floats that carries these keys was to be quantized at load; it is read plain.
"""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import Notes, StoredLinear, StoredModule, check_shape, entry_of, finite_scales
from lowbit.formats.dense import bias_tensors, dense_scheme, dense_tensors, origin_of, read_bias, read_dense
from lowbit.formats.quantization_config import quantization_config
from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme

_STATE = "weight.quant_state.bitsandbytes__"
_FORMATS = {"nf4": "nf4", "fp4": "fp4_bnb"}
# The tool multiplies by this float32 where the definition says / 127.
_INT8_STEP = 7.874015718698502e-3
_STORAGE = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}


class BitsAndBytes:
    """See the module docstring."""

    name = "bitsandbytes"
    aliases = ("bnb", "bitsandbytes_4bit", "bitsandbytes_8bit")
    reference = "bitsandbytes"
    unused = (r".*\.weight_format",)

    def __init__(self, header: CheckpointHeader, notes: Notes) -> None:
        self.header, self.notes = header, notes
        found = quantization_config(header)
        assert found is not None, "claims() saw it"
        self.values, self.place = found.values, found.place
        threshold = self.values.get("llm_int8_threshold", 6.0)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1e6:
            raise LowbitError(
                "E0212",
                f"{self.place}.llm_int8_threshold must be a number from 0, found "
                f"{printable(repr(threshold))}",
            )
        self.threshold = float(threshold)
        packed = any(name.endswith(".SCB") or _STATE in name for name in header.tensors)
        if not packed:
            notes.contradiction(
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
        """The kind, as the config gives it."""
        kind = self.values.get("bnb_4bit_quant_type") if self.values.get("load_in_4bit") else "int8"
        return f"bitsandbytes, {kind} in {self.place.split(':')[0]}"

    def scheme_of(self, module: StoredModule) -> Scheme:
        """From the tensors that are there and their shapes."""
        state = self._state_entry(module)
        if state is not None:
            fmt = number_format(_FORMATS[state.name.rpartition("__")[2]])
            size = self._block_size(module, state)
            return _four_bit_scheme(fmt, module.shape, size)
        if module.tensor("SCB") in self.header.tensors:
            return self._int8_scheme()
        return dense_scheme(self.header, module)

    def tensors_of(self, module: StoredModule) -> list[str]:
        """The weight and everything its state is made of."""
        tensors, weight = self.header.tensors, module.tensor("weight")
        if self._state_entry(module) is not None:
            prefix = f"{weight}."
            parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            found = [prefix + part for part in parts if prefix + part in tensors]
            state = [name for kind in _FORMATS if (name := module.tensor(_STATE + kind)) in tensors]
            return [weight, *found, *state, *bias_tensors(self.header, module)]
        if module.tensor("SCB") in tensors:
            return [weight, module.tensor("SCB"), *bias_tensors(self.header, module)]
        return dense_tensors(self.header, module)

    def read(self, module: StoredModule, data: TensorData) -> StoredLinear:
        """Codes and scales, double quantization taken apart."""
        state = self._state_entry(module)
        if state is not None:
            return StoredLinear(self._four_bit(module, data, state), read_bias(self.header, module, data))
        if module.tensor("SCB") in self.header.tensors:
            return StoredLinear(self._int8(module, data), read_bias(self.header, module, data))
        return read_dense(self.header, module, data)

    def _state_entry(self, module: StoredModule) -> TensorEntry | None:
        for kind in _FORMATS:
            entry = self.header.tensors.get(module.tensor(_STATE + kind))
            if entry is not None:
                if module.expert is not None:
                    raise LowbitError("E0218", f"{module.name}: stacked 4-bit experts are not read")
                return entry
        return None

    # ---- 4 bits

    def _block_size(self, module: StoredModule, state: TensorEntry) -> int:
        """Weights of a block, from the number of scales: the header says enough without reading the state."""
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

    def _part(self, module: StoredModule, part: str, dtypes: tuple[str, ...]) -> TensorEntry:
        return entry_of(self.header, module, f"weight.{part}", dtypes, "a 4-bit bitsandbytes weight")

    def _four_bit(self, module: StoredModule, data: TensorData, state: TensorEntry) -> QuantizedTensor:
        said = _state(state, data)
        fmt = number_format(_FORMATS[state.name.rpartition("__")[2]])
        out, columns = module.shape
        count = out * columns
        if said.get("shape") != [out, columns]:
            raise LowbitError(
                "E0210",
                f"{state.file.name}: {state.name!r} says the weight is {said.get('shape')} but the config "
                f"asks for {[out, columns]}; config and weights are from different models",
            )
        size = self._block_size(module, state)
        if said.get("blocksize") != size and -(-count // size) > 1:
            raise LowbitError(
                "E0213",
                f"{state.file.name}: {state.name!r} says blocksize {said.get('blocksize')}, absmax has "
                f"blocks of {size}; the file is damaged",
            )
        size = int(size)
        self._check_map(module, data, fmt)
        weight = entry_of(self.header, module, "weight", tuple(_STORAGE), "a 4-bit bitsandbytes weight")
        need = -(-count // 2)
        if weight.nbytes != -(-need // _STORAGE[weight.dtype]) * _STORAGE[weight.dtype]:
            raise LowbitError(
                "E0213",
                f"{weight.file.name}: tensor {weight.name!r} has {weight.nbytes} bytes; {count} 4-bit "
                f"weights need {need}. The packing does not match the model's shape {[out, columns]}",
            )
        raw = data.raw(weight.name)[:need]
        codes = torch.stack((raw >> 4, raw & 15), 1).flatten()[:count].view(out, columns)
        absmax = self._absmax(module, data, said, -(-count // size))
        scheme = _four_bit_scheme(fmt, module.shape, size)
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
        if not isinstance(size, int) or size <= 0 or not isinstance(offset, int | float):
            raise LowbitError(
                "E0213",
                f"{entry.file.name}: the state of {module.stored!r} lacks nested_blocksize or nested_offset",
            )
        check_shape(outer, (-(-blocks // size),), "a doubly quantized bitsandbytes weight")
        steps = data.tensor(table.name)[absmax.long()]
        scales = data.tensor(outer.name).repeat_interleave(size)[:blocks]
        return finite_scales(
            self.header, outer.name, steps * scales + torch.tensor(offset, dtype=torch.float32)
        )

    # ---- int8

    def _int8_scheme(self) -> Scheme:
        activation = ActivationScheme(number_format("int8"), (1, 0), limit=127.0, outliers=self.threshold)
        return Scheme(number_format("int8"), ((1, 0),), (number_format("f32"),), activation=activation)

    def _int8(self, module: StoredModule, data: TensorData) -> QuantizedTensor:
        what = "an int8 bitsandbytes weight"
        if module.expert is not None:
            raise LowbitError("E0218", f"{module.name}: stacked int8 experts are not read")
        weight = entry_of(self.header, module, "weight", ("I8",), what)
        check_shape(weight, module.shape, what)
        scb = entry_of(self.header, module, "SCB", ("F32", "F16", "BF16"), what)
        check_shape(scb, module.shape[:1], what)
        layout = self.header.tensors.get(module.tensor("weight_format"))
        if layout is not None and layout.dtype == "U8" and int(data.raw(layout.name)[0]) != 0:
            raise LowbitError(
                "E0218",
                f"{layout.file.name}: tensor {layout.name!r} says the weight is column-tiled for one GPU "
                "generation; save the model again with bitsandbytes 0.42 or newer",
            )
        scales = finite_scales(self.header, scb.name, data.tensor(scb.name)).float() * _INT8_STEP
        codes = data.tensor(weight.name).view(torch.uint8) ^ 0x80
        return QuantizedTensor(
            self._int8_scheme(),
            module.shape,
            codes,
            (scales.view(-1, 1),),
            origin=origin_of(self.header, module),
        )


def _four_bit_scheme(fmt: NumberFormat, shape: tuple[int, int], size: int) -> Scheme:
    flattened = shape[1] % size != 0
    return Scheme(fmt, ((1, size),), (number_format("f32"),), flattened=flattened)


def _state(entry: TensorEntry, data: TensorData) -> dict[str, object]:
    if entry.nbytes > 1 << 16:
        raise LowbitError(
            "E0213", f"{entry.file.name}: {entry.name!r} has {entry.nbytes} bytes; it is no state"
        )
    try:
        said = json.loads(bytes(data.raw(entry.name).numpy()).decode("utf-8"))
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise LowbitError(
            "E0213", f"{entry.file.name}: {entry.name!r} is no JSON object; the file is damaged"
        )
    return said


FORMAT = BitsAndBytes
