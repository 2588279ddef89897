"""The pickles inside PyTorch's weight files, read as data: nothing is imported, built or called.

A pickle is a program for a stack machine. The opcodes that plain tensors need are few, and so are the names
they ask for (``collections.OrderedDict``, ``torch._utils._rebuild_tensor_v2``, the storage classes): both
are tables here, and what is in neither is E0231. A tensor becomes a ``PickledTensor``, which says where it
lies; dictionaries, lists, tuples, texts and numbers become Python's own. Attributes that are set on a
dictionary (``_metadata``) are dropped.

torchao pickles tensor subclasses. Whatever a name under ``torchao.`` is called with, or is given as
attributes, becomes a ``PickledObject``: the name and these values, nothing else (``pickled_objects``).
Source: Python's ``pickletools`` documentation of the protocol, PyTorch's ``torch/serialization.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from lowbit.errors import LowbitError, printable

MAX_BYTES = 64 << 20  # of one pickle; 200 000 tensors need less
MAX_STEPS = 8_000_000

# Storage class or dtype -> the name safetensors has for its elements.
DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR, _TYPED_TENSOR = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_PARAMETER, _SIZE = "torch._utils._rebuild_parameter", "torch.Size"
# A subclass that wraps tensors: _rebuild_from_type_v2(_rebuild_wrapper_subclass, its class, …, attributes).
_SUBCLASS, _WRAPPER = "torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_wrapper_subclass"
_PLACES = ("torch.device", "torch.serialization._get_layout")  # where and how a wrapper lies: it has no data
_OBJECTS = "torchao."
_GETATTR = ("builtins.getattr", "__builtin__.getattr")  # how Python 3.11 pickles members of an enum
_STORAGES = {f"torch.{name}": name for name in DTYPES if name.endswith("Storage")}
_STORAGES["torch.storage.UntypedStorage"] = "UntypedStorage"
_TYPES = {f"torch.{name}": dtype for name, dtype in DTYPES.items() if not name.endswith("Storage")}
# Widths of codes that no storage has: torchao names them as what its codes are worth.
_FEW_BITS = {f"torch.{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8)}
ALLOWED = frozenset(
    {_ORDERED_DICT, _TENSOR, _TYPED_TENSOR, _PARAMETER, _SIZE, *_STORAGES, *_TYPES}
    | {_SUBCLASS, _WRAPPER, *_PLACES, *_GETATTR, *_FEW_BITS}
)


@dataclass(frozen=True)
class Name:
    """A class or function the pickle asks for by name, one of ``ALLOWED``."""

    full: str


@dataclass(frozen=True)
class Storage:
    """A run of bytes elsewhere in the file. ``size`` counts elements of ``dtype``."""

    key: str
    dtype: str
    size: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage; ``offset`` and ``strides`` count elements of ``dtype``."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class PickledObject:
    """One of torchao's: the ``kind`` that would be made, of which values, with which attributes."""

    kind: str  # the class's own name, without its module
    values: tuple[object, ...]
    attributes: dict[object, object]


class _Mark:
    """What MARK leaves on the stack."""


def read_pickle(data: bytes, file: str, start: int = 0) -> tuple[object, int]:
    """(what the pickle at ``start`` says, where it ends). ``file``: its name, for messages."""
    machine = _Machine(data, file, start)
    return machine.run(), machine.at


class _Machine:
    def __init__(self, data: bytes, file: str, start: int) -> None:
        self.data, self.file, self.at = data, file, start
        self.begin = start  # of the opcode in hand, for messages
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        for _ in range(MAX_STEPS):
            self.begin = self.at
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                return self.pop()
            step = _STEPS.get(code)
            if step is None:
                raise self.refused(f"holds opcode 0x{code:02x}")
            step(self)
        raise self.refused(f"has more than {MAX_STEPS} steps")

    # ---- errors

    def refused(self, what: str) -> LowbitError:
        return LowbitError(
            "E0231",
            f"{self.file} {what} at byte {self.begin}: not a plain weight file; refused, nothing was run. "
            "Use the repo's .safetensors files, or re-save the tensors with safetensors.torch.save_file",
        )

    def damaged(self, what: str) -> LowbitError:
        return LowbitError("E0232", f"{self.file}: {what} at byte {self.begin}; the file is damaged")

    # ---- bytes, stack and memo

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise self.damaged("its pickle ends in the middle of an opcode")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self, form: str) -> None:
        try:
            self.push(self.take(self.number(form)).decode("utf-8"))
        except UnicodeDecodeError:
            raise self.damaged("a text is no UTF-8") from None

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 512)
        if end < 0:
            raise self.damaged("a name has no end")
        line = self.data[self.at : end]
        self.at = end + 1
        return line.decode("utf-8", "replace")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise self.damaged("its pickle takes more from the stack than there is")
        return self.stack.pop()

    def top(self) -> object:
        value = self.pop()
        self.push(value)
        return value

    def since_mark(self) -> list[object]:
        for at in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[at], _Mark):
                found = self.stack[at + 1 :]
                del self.stack[at:]
                return found
        raise self.damaged("its pickle looks for a mark that is not there")

    def remember(self, key: int) -> None:
        self.memo[key] = self.top()

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise self.damaged(f"its pickle recalls entry {key}, which it never kept")
        self.push(self.memo[key])

    def tuple_of(self, count: int) -> None:
        found = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(found)))

    def extend(self, values: list[object]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise self.refused(f"appends to a {type(target).__name__}")
        target.extend(values)

    def set_items(self, values: list[object]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(values) % 2:
            raise self.refused(f"sets items of a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise self.refused(f"has a dictionary key that is a {type(key).__name__}")
            if key in target:
                raise self.damaged(f"key {printable(repr(key))} is there twice")
            target[key] = value

    # ---- names and what is made with them

    def name(self, module: str, attribute: str) -> None:
        full = f"{module}.{attribute}"
        if full not in ALLOWED and not full.startswith(_OBJECTS):
            raise self.refused(f"asks for {printable(repr(full))}")
        self.push(Name(full))

    def stack_global(self) -> None:
        attribute, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise self.refused("asks for a name that is no text")
        self.name(module, attribute)

    def persistent(self) -> None:
        """("storage", class, key, device, elements) of a zip file; the legacy form adds None."""
        found = self.pop()
        if not isinstance(found, tuple) or len(found) not in (5, 6) or found[0] != "storage":
            raise self.refused("refers to something that is no storage")
        kind, key, size = found[1], found[2], found[4]
        if not isinstance(kind, Name) or kind.full not in _STORAGES:
            raise self.refused("has a storage of no known class")
        if not isinstance(key, str) or not _whole(size):
            raise self.damaged("a storage has no key or size")
        if len(found) == 6 and found[5] is not None:
            raise self.refused("has a storage that is a view of another")
        self.push(Storage(key, DTYPES[_STORAGES[kind.full]], int(str(size))))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise self.refused("calls something that is no name")
        match function.full:
            case "collections.OrderedDict" if not arguments:
                self.push({})
            case "torch._utils._rebuild_tensor_v2" if len(arguments) >= 4:
                self.push(self.tensor(arguments, None))
            case "torch._utils._rebuild_tensor_v3" if len(arguments) >= 7:
                kind = arguments[6]
                if not isinstance(kind, Name) or kind.full not in _TYPES:
                    raise self.refused("has a tensor of no known dtype")
                self.push(self.tensor(arguments, _TYPES[kind.full]))
            case "torch._utils._rebuild_parameter" if arguments and isinstance(
                arguments[0], PickledTensor | PickledObject
            ):
                self.push(arguments[0])
            case "torch._tensor._rebuild_from_type_v2" if len(arguments) == 4:
                self.push(self.subclass(arguments))
            case "torch.device" | "torch.serialization._get_layout":
                self.push(None)
            case "builtins.getattr" | "__builtin__.getattr" if _is_object(arguments[:1]):
                self.push(self.object_of(arguments[0], arguments[1:]))
            case _ if _is_object((function,)):
                self.push(self.object_of(function, arguments))
            case "torch.Size" if len(arguments) == 1 and isinstance(arguments[0], tuple):
                self.push(arguments[0])
            case _:
                raise self.refused(f"calls {function.full} in a way plain tensors never do")

    def tensor(self, arguments: tuple[object, ...], dtype: str | None) -> PickledTensor:
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, Storage) or not _whole(offset):
            raise self.damaged("a tensor has no storage or offset")
        for sizes in (shape, strides):
            if not isinstance(sizes, tuple) or len(sizes) > 8 or not all(_whole(size) for size in sizes):
                raise self.damaged("a tensor has no shape or strides")
        if len(shape) != len(strides):  # type: ignore[arg-type]
            raise self.damaged("a tensor has other strides than dimensions")
        return PickledTensor(storage, dtype or storage.dtype, offset, shape, strides)  # type: ignore[arg-type]

    def object_of(self, name: object, values: tuple[object, ...]) -> PickledObject:
        assert isinstance(name, Name), "the caller looked"
        return PickledObject(name.full.rpartition(".")[2], values, {})

    def new_object(self) -> None:
        values, kind = self.pop(), self.pop()
        if not _is_object((kind,)) or not isinstance(values, tuple):
            raise self.refused("makes an object")
        self.push(self.object_of(kind, values))

    def subclass(self, arguments: tuple[object, ...]) -> PickledObject:
        """What wraps tensors, which are among its attributes."""
        rebuild, kind, _, state = arguments
        wraps = isinstance(rebuild, Name) and rebuild.full == _WRAPPER
        if not wraps or not _is_object((kind,)) or not isinstance(state, dict):
            raise self.refused("has a tensor of a class of its own")
        return PickledObject(self.object_of(kind, ()).kind, (), state)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, PickledObject):
            if not isinstance(state, dict):
                raise self.refused(f"sets attributes of a {target.kind} that are no dictionary")
            target.attributes.update(state)
        elif not isinstance(target, dict):  # a dictionary's are _metadata
            raise self.refused(f"sets attributes of a {type(target).__name__}")


def _is_object(names: tuple[object, ...]) -> bool:
    return all(isinstance(name, Name) and name.full.startswith(_OBJECTS) for name in names) and bool(names)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _protocol(machine: _Machine) -> None:
    if machine.take(1)[0] > 5:
        raise machine.refused("is of an unknown protocol")


def _frame(machine: _Machine) -> None:
    machine.take(8)  # how long the next piece is


def _long(machine: _Machine) -> None:
    machine.push(int.from_bytes(machine.take(machine.take(1)[0]), "little", signed=True))


def _memoize(machine: _Machine) -> None:
    machine.remember(len(machine.memo))


def _global(machine: _Machine) -> None:
    module = machine.line()
    machine.name(module, machine.line())


_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: _protocol,
    0x95: _frame,
    ord("("): lambda m: m.push(_Mark()),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("J"): lambda m: m.push(m.number("<i")),
    0x8A: _long,
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    0x8C: lambda m: m.text("<B"),
    ord("X"): lambda m: m.text("<I"),
    0x8D: lambda m: m.text("<Q"),
    ord("]"): lambda m: m.push([]),
    ord("a"): lambda m: m.extend([m.pop()]),
    ord("e"): lambda m: m.extend(m.since_mark()),
    ord(")"): lambda m: m.push(()),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    ord("}"): lambda m: m.push({}),
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    ord("q"): lambda m: m.remember(m.number("<B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    0x94: _memoize,
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("c"): _global,
    0x93: lambda m: m.stack_global(),
    ord("Q"): lambda m: m.persistent(),
    ord("R"): lambda m: m.reduce(),
    0x81: lambda m: m.new_object(),
    ord("b"): lambda m: m.build(),
}
