"""Step plans: a step recorded once as a list of native calls and replayed in one (the CPU's "CUDA graph").

A decode step of a small model is a few hundred native calls of microseconds each, and Python between them
costs as much again. While a recorder is active, every call of an ``Operation`` is done and written down:

    words   [number, count, argument, argument …][number, count, argument …] …    a 64-bit word each

Addresses stay valid because what a step allocates comes from an ``Arena`` at fixed places, which frees a
block when its last tensor dies, as an eager step would, and gives it to later tensors of the same step.
Plans share their arena: only one of them runs at a time, and its result is copied before the next. What a
step reads that changes (tokens, positions, pages) lies in static tensors that its caller writes to.

A plan is only right if nothing but native calls computed anything. A dispatch mode watches every torch
operation of the step: allocations and views are allowed, anything else makes the step one that cannot be
captured, with the operation's and the layer's name as the reason. The step itself has then run as always.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from types import FrameType
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.host_memory import zeros

_ALIGNMENT = 64  # bytes: a cache line
_CHUNK = 1 << 20  # bytes an arena begins with, at least
_LARGE_CHUNK = 1 << 24  # and grows by: prompts' tensors have a row of some KB a token, in huge pages

Fault = Callable[[int], Exception]


def _unexpected(status: int) -> Exception:
    return LowbitError("E0700", f"a native operation failed with status {status}")


class _Current(threading.local):
    """The recorder of this thread."""

    recorder: Recorder | None = None


_current = _Current()


def refuse(reason: str) -> None:
    """Tell an active recorder why the step it records cannot be captured."""
    if _current.recorder is not None:
        _current.recorder.refuse(reason)


class Operation:
    """A native function that an active recorder writes down. ``fault``: the error a status means."""

    __slots__ = ("_function", "fault", "floats", "name", "number")

    def __init__(
        self, library: ctypes.CDLL, name: str, arguments: tuple[type, ...], fault: Fault | None = None
    ) -> None:
        self._function = getattr(library, f"lowbit_{name}")
        self._function.argtypes = arguments
        self._function.restype = None if fault is None else ctypes.c_int32
        self.name = name
        self.fault = fault or _unexpected
        self.floats = tuple(argument is ctypes.c_float for argument in arguments)
        self.number = _number(library, name, len(arguments))

    def __call__(self, *arguments: object) -> None:
        """Call it; a status but 0 is raised as the operation's error."""
        status = self._function(*arguments)
        if status:
            raise self.fault(status)
        if _current.recorder is not None:
            _current.recorder.note(self, arguments)


def native_operation(name: str, arguments: tuple[type, ...], fault: Fault | None = None) -> Operation | None:
    """The native library's operation, or None where there is no library."""
    library = native.library()
    return None if library is None else Operation(library, name, arguments, fault)


def no_memory(purpose: str) -> Fault:
    """For operations that fail for this reason alone: "no memory for a product's input"."""
    return lambda _: MemoryError(f"no memory {purpose}")


def _number(library: ctypes.CDLL, name: str, arguments: int) -> int:
    library.lowbit_operation.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    library.lowbit_operation.restype = ctypes.c_int32
    count = ctypes.c_int32()
    number = int(library.lowbit_operation(name.encode(), ctypes.byref(count)))
    assert number >= 0 and count.value == arguments, f"{name}: csrc/operations.h and its caller disagree"
    return number


class Arena:
    """Memory at fixed addresses for the tensors of a step; at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: list[Tensor] = []
        self._free: list[tuple[int, int]] = []  # (address, bytes), ascending
        self._live: dict[int, int] = {}
        self._epoch = 0
        self.full = False

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return sum(chunk.numel() for chunk in self._chunks)

    @property
    def live(self) -> set[int]:
        """Addresses of the blocks of this recording that tensors still use."""
        return set(self._live)

    def begin(self) -> None:
        """A new recording: all memory is free again, whoever still has tensors of an earlier one."""
        self._epoch += 1
        self._live = {}
        self._free = sorted((chunk.data_ptr(), chunk.numel()) for chunk in self._chunks)
        self.full = False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """An uninitialized tensor; None where the arena may not grow that far."""
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        address = self._take(size)
        if address is None:
            return None
        block = (ctypes.c_uint8 * size).from_address(address)
        # The storage holds the block, every view the storage: it dies with the last of them.
        freed = weakref.finalize(block, self._give_back, self._epoch, address, size)
        freed.atexit = False
        return torch.frombuffer(block, dtype=dtype, count=count).view(shape)

    def _take(self, size: int) -> int | None:
        for place, (address, free) in enumerate(self._free):
            if free >= size:
                if free == size:
                    del self._free[place]
                else:
                    self._free[place] = (address + size, free - size)
                self._live[address] = size
                return address
        grown = max(size, _LARGE_CHUNK if self._chunks else _CHUNK)
        if self.nbytes + grown > self._limit:
            grown = max(size, _CHUNK)
        if self.nbytes + grown > self._limit:
            self.full = True
            return None
        chunk = zeros((grown,), torch.uint8)  # at a page's border
        self._chunks.append(chunk)
        self._free = sorted([*self._free, (chunk.data_ptr(), grown)])
        return self._take(size)

    def _give_back(self, epoch: int, address: int, size: int) -> None:
        if epoch != self._epoch:
            return
        del self._live[address]
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (address, size)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged


@dataclass(frozen=True)
class StepPlan:
    """A recorded step; ``result`` is where it leaves what it computes."""

    words: np.ndarray  # int64
    operations: tuple[Operation, ...]
    result: Tensor
    kept: tuple[object, ...]  # structures whose addresses are among the words

    @cached_property
    def address(self) -> int:
        """Of the words."""
        return int(self.words.ctypes.data)

    def run(self) -> Tensor:
        """Replay it; the result is overwritten by the next plan of the same arena."""
        status = ctypes.c_int32()
        failed = _run_function()(self.address, len(self.words), ctypes.byref(status))
        if failed >= 0:
            raise self.operations[failed].fault(status.value)
        return self.result

    def profile(self, runs: int) -> list[tuple[Operation, tuple[int, ...], float]]:
        """Each operation with its argument words and the seconds it took, the mean over ``runs`` replays."""
        status = ctypes.c_int32()
        spent = np.zeros(len(self.operations), dtype=np.int64)
        for _ in range(runs):
            failed = _profile_function()(
                self.address, len(self.words), ctypes.byref(status), spent.ctypes.data
            )
            if failed >= 0:
                raise self.operations[failed].fault(status.value)
        found: list[tuple[Operation, tuple[int, ...], float]] = []
        at = 0
        for operation, nanoseconds in zip(self.operations, spent, strict=True):
            count = int(self.words[at + 1])
            found.append(
                (operation, tuple(self.words[at + 2 : at + 2 + count].tolist()), nanoseconds / runs / 1e9)
            )
            at += 2 + count
        return found


@cache
def _profile_function() -> Callable[..., int]:
    library = native.library()
    assert library is not None, "a plan was recorded with it"
    library.lowbit_plan_profile.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    library.lowbit_plan_profile.restype = ctypes.c_int64
    return cast(Callable[..., int], library.lowbit_plan_profile)


@cache
def _run_function() -> Callable[..., int]:
    library = native.library()
    assert library is not None, "a plan was recorded with it"
    library.lowbit_plan_run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    library.lowbit_plan_run.restype = ctypes.c_int64
    return cast(Callable[..., int], library.lowbit_plan_run)


class Recorder:
    """Writes down one step."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.reason = ""  # why the step cannot be captured
        self._words: list[int] = []
        self._operations: list[Operation] = []
        self._kept: list[object] = []

    def note(self, operation: Operation, arguments: tuple[object, ...]) -> None:
        """One native call that was just made."""
        self._operations.append(operation)
        self._words += (operation.number, len(arguments))
        for value, is_float in zip(arguments, operation.floats, strict=True):
            if is_float:
                bits = struct.unpack("<I", struct.pack("<f", value))[0]
                self._words.append(bits)
            elif value is None:
                self._words.append(0)
            elif isinstance(value, int):
                self._words.append(value)
            else:  # byref(structure)
                structure = value._obj  # type: ignore[attr-defined]
                self._kept.append(structure)
                self._words.append(ctypes.addressof(structure))

    def refuse(self, reason: str) -> None:
        """The step cannot be captured; the first reason counts."""
        self.reason = self.reason or reason

    def record(self, step: Callable[[], Tensor]) -> tuple[Tensor, StepPlan | None]:
        """Run ``step``; what it returned, and the plan, or None with a ``reason``."""
        assert _current.recorder is None, "one recording at a time"
        self.arena.begin()
        _current.recorder = self
        try:
            with _Watch(self):
                result = step()
        finally:
            _current.recorder = None
        if self.arena.full:
            self.refuse("its tensors take more memory than plans may")
        elif self.arena.live != {result.untyped_storage().data_ptr()}:
            self.refuse("a tensor of the step outlives it")
        if self.reason:
            return result, None
        words = np.array(self._words, dtype=np.int64)
        return result, StepPlan(words, tuple(self._operations), result, tuple(self._kept))


_aten = torch.ops.aten


class _Watch(TorchDispatchMode):
    """Sees every torch operation of the step that is recorded."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler to keep it out of the handler: two seconds and 800 modules.
        return False

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, function, types, args=(), kwargs=None
    ):
        """Allocations come from the arena, views pass, all else is refused (and done)."""
        kwargs = kwargs or {}
        shape: tuple[int, ...] | None = None
        dtype = kwargs.get("dtype")
        if function is _aten.empty.memory_format:
            shape, dtype = tuple(args[0]), dtype or torch.get_default_dtype()
        elif function is _aten.new_empty.default:
            shape, dtype = tuple(args[1]), dtype or args[0].dtype
        elif function is _aten.empty_like.default:
            shape, dtype = tuple(args[0].shape), dtype or args[0].dtype
            if kwargs.get("memory_format") is None and not args[0].is_contiguous():
                shape = None  # would keep its strides
        row_major = kwargs.get("memory_format") in (None, torch.contiguous_format)
        if shape is not None and row_major and _is_cpu(kwargs.get("device")):
            found = self._recorder.arena.empty(shape, dtype)
            if found is not None:
                return found
        elif not function.is_view or function is _aten.lift_fresh.default:
            # lift_fresh: numbers of Python's (torch.tensor, from_numpy), which a replay would not see change.
            self._recorder.refuse(f"{function} in {place(_callers())}")
        return function(*args, **kwargs)


def _is_cpu(device: object) -> bool:
    return device is None or torch.device(cast(str, device)).type == "cpu"


def place(frames: Iterable[FrameType]) -> str:
    """The layer and the function of lowbit that were running, from the innermost frame outwards."""
    function = ""
    for frame in frames:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("lowbit.") and module != __name__:
            function = function or f"{module.removeprefix('lowbit.')}.{frame.f_code.co_name}"
            owner = frame.f_locals.get("self")
            layer = getattr(owner, "name", "") if type(owner).__module__.startswith("lowbit.layers") else ""
            if layer:
                return f"{layer} ({function})"
    return function or "the model"


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
