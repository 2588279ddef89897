"""The PTX of ``kernels.gpu.assembly``, run on numpy arrays: as much of the instruction set as it uses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl

Array = np.ndarray[Any, np.dtype[np.uint32]]


def _permuted(a: Array, b: Array, selector: int) -> Array:
    a, b = np.broadcast_arrays(a, b)
    both = [held >> np.uint32(at) & np.uint32(0xFF) for held in (a, b) for at in (0, 8, 16, 24)]
    found = np.zeros_like(a)
    for out in range(4):
        chosen = selector >> 4 * out & 15
        byte = both[chosen & 7]
        if chosen & 8:
            byte = np.where(byte & 0x80, 0xFF, 0).astype(np.uint32)
        found |= byte << np.uint32(8 * out)
    return found


def _table(a: Array, b: Array, c: Array, table: int) -> Array:
    found = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for row in range(8):
        if table >> row & 1:
            one = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            found |= one
    return found


def _fused(kind: str, a: Array, b: Array, c: Array) -> Array:
    dtype = torch.bfloat16 if kind == "bf16x2" else torch.float16

    def halves(x: Array) -> torch.Tensor:
        return torch.from_numpy(np.broadcast_to(x, a.shape).copy().view(np.uint16)).view(dtype).double()

    # The sum is exact in float64: products have 22 bits, and what is added is 0 or of the same size.
    found = (halves(a) * halves(b) + halves(c)).to(dtype)
    return found.view(torch.uint16).numpy().view(np.uint32)


def run(text: str, inputs: Sequence[Array]) -> Array:
    """Register $0 behind the block ``text``; $1 and on are ``inputs``, uint32 each."""
    registers: dict[str, Array] = {f"${number + 1}": held for number, held in enumerate(inputs)}

    def value(word: str) -> Array:
        return np.array([int(word, 0)], np.uint32) if word[0].isdigit() else registers[word]

    for line in text.splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        operation, words = re.fullmatch(r"([a-z0-9.]+) (.*);", line).groups()  # type: ignore[union-attr]
        target, *given = words.split(", ")
        match operation.split("."):
            case ["mov", "b32"]:
                found = value(given[0])
            case ["prmt", "b32"]:
                found = _permuted(value(given[0]), value(given[1]), int(given[2], 0))
            case ["shl", "b32"]:
                found = value(given[0]) << value(given[1])
            case ["shr", "u32"]:
                found = value(given[0]) >> value(given[1])
            case ["and", "b32"]:
                found = value(given[0]) & value(given[1])
            case ["xor", "b32"]:
                found = value(given[0]) ^ value(given[1])
            case ["add", "u32"]:
                found = value(given[0]) + value(given[1])
            case ["lop3", "b32"]:
                found = _table(*map(value, given[:3]), int(given[3], 0))
            case ["fma", "rn", kind]:
                found = _fused(kind, *map(value, given))
            case _:
                raise AssertionError(f"no such instruction here: {line}")
        registers[target] = found
    return registers["$0"]


class Block:
    """What ``create_inline_asm`` returns in Triton's interpreter, had it one: two elements a register."""

    def __init__(
        self, text: str, constraints: str, handles: list[Any], types: list[Any], pure: bool, pack: int
    ) -> None:
        assert pack == 2 and pure and len(types) == 1
        registers = []
        for handle in handles:
            flat = np.broadcast_to(handle.data, handles[0].data.shape).reshape(-1, 2)
            if flat.itemsize == 4:  # a register each
                registers += [flat[:, 0].astype(np.uint32), flat[:, 1].astype(np.uint32)]
            else:
                assert flat.itemsize == 1
                registers.append(
                    np.ascontiguousarray(flat).view(np.uint8).view(np.uint16)[:, 0].astype(np.uint32)
                )
        assert constraints.count(",") == len(registers)
        found = np.broadcast_to(run(text, registers), registers[0].shape).copy()
        kind = types[0].scalar
        data = found.view(np.uint16).view(np.float16 if kind == tl.float16 else np.uint16)
        self._result = type(handles[0])(data.reshape(handles[0].data.shape), kind)

    def get_result(self, number: int) -> Any:
        """The handle of the only result."""
        assert number == 0
        return self._result
