"""The packed cache: what packing made of a checkpoint, kept as one file that the next start maps.

``--packed-cache`` turns it on. A start that finds its file reads, quantizes and packs no weight: the buffers
of every Linear and of the embedding are mapped as they were, shared by all processes that map them, and the
system may drop their pages whenever it needs the memory.

    packed/<key>.packed      key: SHA-256 over everything that the bytes depend on (``Identity``)

    magic, 16 bytes | header's length, u64 | header's SHA-256 | header, JSON | zeros to 4096 | buffers

A buffer starts at a multiple of 64 bytes from the file's start. The header holds the key, the buffers' size
and for each module its weights (kernel, scheme, shape, buffers), its bias and what is done to its inputs. A
file appears under its name whole and synced, or not at all; one that is not what it should be is removed,
with a line in the log, and made again. The bytes of the buffers themselves are summed as little as those of a
checkpoint: that would read all of them at every start.

No file is used whose checkpoint, options, kernels (``kernel.layout`` numbers the meaning of their bytes) or
code differ from today's, and none is kept while the checkpoint's files are changing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import mmap
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lowbit.checkpoint.embedded import cache_directory
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.output_folder import sync_folder
from lowbit.checkpoint.tensor_data import DTYPES, mapped_file
from lowbit.errors import LowbitError, printable, thousands
from lowbit.kernels import PackedWeight, linear_kernels, native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.rotation import Rotator
from lowbit.kernels.rounded_output import OutputTransform, RoundedOutput
from lowbit.loading.opened import Opened, Target
from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import ActivationScheme, Delay, RotationScheme, Scheme

_log = logging.getLogger("lowbit")

_MAGIC = b"lowbit packed 1\n"
_PREFIX = struct.Struct("<16sQ32s")
_SUFFIX, _PART = ".packed", "part-"
_ALIGNMENT, _PAGE = 64, 4096
_LARGEST_HEADER = 256 << 20
_GIB = 1 << 30
_SETTLED_SECONDS = 2.0  # a file changed later than that may change again within one tick of its clock
_STALE_SECONDS = 86_400.0  # what a broken writer left
_CODE = ("checkpoint", "formats", "kernels", "layers", "loading", "models", "numerics", "quantize")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Kept:
    """One module, packed: ``inputs[i]`` is done to x before ``weights[i]``; without the state of a delay.

    ``outputs[i]``: what the results are rotated by or rounded to; none at all where no result is.
    """

    weights: list[PackedWeight]
    inputs: list[InputTransform | None]
    bias: Tensor | None = None
    outputs: list[OutputTransform | None] = field(default_factory=list)


@dataclass(frozen=True)
class PackedCache:
    """The folder, and how many bytes it may hold."""

    folder: Path
    limit: int

    @classmethod
    def asked(cls, where: str, gigabytes: float) -> PackedCache | None:
        """What ``--packed-cache`` says: off, on (lowbit's cache folder), or a folder."""
        if where == "off":
            return None
        folder = cache_directory() / "packed" if where == "on" else Path(where).expanduser()
        return cls(folder, int(gigabytes * _GIB))

    def file_of(self, opened: Opened, target: Target, head_screen: str = "off") -> PackedFile | None:
        """The file of this model as it is asked for; None where nothing may be kept."""
        if target.device.type != "cpu":
            return None
        try:
            identity = Identity.of(opened, target, head_screen)
        except OSError as error:
            _log.info("lowbit: packed weights are not kept: %s", error)
            return None
        return PackedFile(self, identity)


@dataclass(frozen=True)
class Identity:
    """Everything the packed bytes depend on. ``files``: [path, size, mtime, ctime, inode] of each."""

    files: list[list[Any]]
    others: dict[str, object]

    @classmethod
    def of(cls, opened: Opened, target: Target, head_screen: str) -> Identity:
        """As things are now; OSError where a file cannot be looked at."""
        header, recipe = opened.header, opened.recipe
        files = set(_files_of(header))
        if recipe is not None:
            texts = [str(value) for method in recipe.methods for value in method.options.values()]
            files |= {path for text in texts if (path := Path(text).expanduser()).is_file()}
        tensors = [
            [entry.name, entry.dtype, list(entry.shape), entry.start, entry.nbytes, str(entry.file)]
            for entry in header.tensors.values()
        ]
        others: dict[str, object] = {
            "tensors": _sum(tensors),
            "config": _sum(header.config),
            "target": [
                str(target.device),
                str(target.activation_dtype),
                str(target.dense_dtype),
                target.int8_inputs,
            ],
            "recipe": None if recipe is None else _sum(repr((recipe.rules, recipe.default))),
            "strict": opened.strict,
            "linear_kernel": repr(target.kernels.rules),
            "lm_head_screen": head_screen,
            "isa": native.isa(),
            "kernels": {kernel.name: kernel.layout for kernel in linear_kernels()},
            "code": _sum(_code()),
            "torch": torch.__version__,
        }
        return cls([_stamp(path) for path in sorted(files)], others)

    @property
    def key(self) -> str:
        """A name for it: 64 hexadecimal digits."""
        return _sum([self.files, self.others])

    @property
    def settled(self) -> bool:
        """Whether no file changed just now, or in the future."""
        return all(stamp[2] <= (time.time() - _SETTLED_SECONDS) * 1e9 for stamp in self.files)

    @property
    def unchanged(self) -> bool:
        """Whether the files are still those."""
        try:
            return all(_stamp(Path(stamp[0])) == stamp for stamp in self.files)
        except OSError:
            return False


def _files_of(header: CheckpointHeader) -> Iterator[Path]:
    """Files of tensors, and what lies beside them in a folder: formats read configs of several names."""
    yield from {entry.file for entry in header.tensors.values()}
    if header.root.is_dir():
        yield from (Path(entry.path) for entry in os.scandir(header.root) if entry.is_file())


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _code() -> list[list[object]]:
    """lowbit's own files: a version number does not change with every edit."""
    root = Path(__file__).parents[1]
    found: list[list[object]] = []
    for package in _CODE:
        for entry in os.scandir(root / package):
            if entry.name.endswith(".py"):
                status = entry.stat()
                found.append([package, entry.name, status.st_size, status.st_mtime_ns])
    library = native.library_file()
    return sorted(found, key=str) + ([] if library is None else [_stamp(library)])


def _sum(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class PackedFile:
    """One model's file. ``read`` what is there, or ``store`` what was packed."""

    cache: PackedCache
    identity: Identity
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.cache.folder / f"{self.identity.key}{_SUFFIX}"

    def read(self) -> tuple[dict[str, Kept], dict[str, str]] | None:
        """The modules by name and the reader's notes; None where there is no such file, or no sound one."""
        try:
            modules, notes = _read(self.path, self.identity.key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, LowbitError) as error:
            text = "lowbit: packed weights in %s are damaged (%s); they are packed again"
            _log.warning(text, self.path.name, printable(error) or type(error).__name__)
            with contextlib.suppress(OSError):
                self.path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)  # what was used last is removed last
        return modules, notes

    def store(self, modules: Mapping[str, Kept], notes: Mapping[str, str]) -> None:
        """Keep the modules, if nothing speaks against it; serving never fails by it."""
        if not self.identity.settled or not self.identity.unchanged:
            _log.info("lowbit: packed weights are not kept: the model's files are being changed")
            return
        try:
            self._store(modules, notes)
        except (OSError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            _log.warning("lowbit: packed weights are not kept: %s", reason or error)

    def _store(self, modules: Mapping[str, Kept], notes: Mapping[str, str]) -> None:
        writer = _Writer()
        listed = {name: _described(kept, writer) for name, kept in modules.items()}
        header, nbytes = writer.header({"key": self.identity.key, "notes": dict(notes), "modules": listed})
        folder = self.cache.folder
        if nbytes > self.cache.limit:
            text = "lowbit: packed weights are not kept: %s bytes, and --packed-cache-gb allows %s"
            _log.warning(text, thousands(nbytes), thousands(self.cache.limit))
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._make_room(nbytes)
        free = shutil.disk_usage(folder).free
        if nbytes + _GIB > free:
            text = "lowbit: packed weights are not kept: %s bytes, and %s are free in %s"
            _log.warning(text, thousands(nbytes), thousands(free), printable(folder))
            return
        with tempfile.NamedTemporaryFile(dir=folder, prefix=_PART, delete=False) as part:
            temporary = Path(part.name)
            try:
                writer.write(part, header)
                part.flush()
                os.fsync(part.fileno())
                os.replace(temporary, self.path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_folder(folder)
        _log.info("lowbit: packed weights kept in %s (%s bytes)", printable(self.path), thousands(nbytes))

    def _make_room(self, needed: int) -> None:
        """Remove what was used longest ago until ``needed`` more bytes stay within the limit."""
        found: list[tuple[float, int, Path]] = []
        for entry in os.scandir(self.cache.folder):
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if entry.name.startswith(_PART) and status.st_mtime < time.time() - _STALE_SECONDS:
                    os.unlink(entry.path)
                elif entry.name.endswith(_SUFFIX) and entry.path != str(self.path):
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
        total = needed + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.cache.limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size
                _log.info("lowbit: packed weights removed, used longest ago: %s", path.name)


class _Writer:
    """Gathers tensors and their places, then writes them behind a header."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._placed: dict[int, list[object]] = {}
        self._end = 0  # from the first buffer on

    def place(self, tensor: Tensor) -> list[object]:
        """[dtype, shape, start]: how the header names a tensor."""
        name = _NAMES.get(tensor.dtype)
        if name is None or tensor.device.type != "cpu":
            raise TypeError(f"a buffer is {tensor.dtype} on {tensor.device}")
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._tensors.append(tensor)
        self._end = start + tensor.nbytes
        return [name, list(tensor.shape), start]

    def place_once(self, tensor: Tensor) -> list[object]:
        """The same for a tensor that comes again and again."""
        if id(tensor) not in self._placed:  # it lives as long as the writer
            self._placed[id(tensor)] = self.place(tensor)
        return self._placed[id(tensor)]

    def header(self, values: dict[str, object]) -> tuple[bytes, int]:
        """The header's bytes and the size of the whole file."""
        values["buffer_bytes"] = self._end
        header = json.dumps(values).encode()
        return header, _first_buffer(len(header)) + self._end

    def write(self, file: IO[bytes], header: bytes) -> None:
        """The whole file."""
        file.write(_PREFIX.pack(_MAGIC, len(header), hashlib.sha256(header).digest()))
        file.write(header)
        first = _first_buffer(len(header))
        written = _PREFIX.size + len(header) - first
        for tensor in self._tensors:
            start = -(-max(written, 0) // _ALIGNMENT) * _ALIGNMENT
            file.write(bytes(start - written))
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written = start + tensor.nbytes
        file.write(bytes(max(-written, 0)))


def _first_buffer(header_bytes: int) -> int:
    return -(-(_PREFIX.size + header_bytes) // _PAGE) * _PAGE


def _described(kept: Kept, writer: _Writer) -> dict[str, object]:
    """A module for the header. TypeError where something in it has no place there."""
    transforms = list({id(t): t for t in kept.inputs if t is not None}.values())
    numbers = {id(transform): number for number, transform in enumerate(transforms)}
    listed = []
    for transform in transforms:
        values: dict[str, object] = {}
        for name, value in _fields(transform).items():
            if name in ("state", "across"):  # of a running model; ranks keep nothing
                continue
            if isinstance(value, Rotator):
                values[name] = {"rotation": _rotation(value, writer)}
            else:
                values[name] = {"tensor": writer.place(value)} if isinstance(value, Tensor) else _plain(value)
        listed.append(values)
    return {
        "weights": [
            {
                "kernel": weight.kernel.name,
                "scheme": _plain(weight.scheme),
                "shape": list(weight.shape),
                "origin": weight.origin,
                "buffers": {name: writer.place(buffer) for name, buffer in weight.buffers.items()},
            }
            for weight in kept.weights
        ],
        "inputs": [None if transform is None else numbers[id(transform)] for transform in kept.inputs],
        "transforms": listed,
        "bias": None if kept.bias is None else writer.place(kept.bias),
        "outputs": [None if one is None else _output(one, writer) for one in kept.outputs],
    }


def _rotation(rotator: Rotator, writer: _Writer) -> dict[str, object]:
    """Many layers share one: its tensors are written once."""
    rotation = rotator.rotation
    places = {name: writer.place_once(tensor) for name, tensor in rotation.tensors.items()}
    return {"size": rotation.size, "divisor": rotation.divisor, "tensors": places}


def _output(output: OutputTransform, writer: _Writer) -> dict[str, object]:
    if isinstance(output, Rotator):
        return _rotation(output, writer)
    scale = output.codes.static_scale
    assert scale is not None, "it is static"
    return {"rounded": _plain(output.codes.scheme), "scale": writer.place(scale)}


_CLASSES = {cls.__name__: cls for cls in (Scheme, ActivationScheme, Delay, RotationScheme)}


def _fields(value: object) -> dict[str, Any]:
    assert dataclasses.is_dataclass(value), "schemes and transforms are"
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _plain(value: object) -> object:
    """A scheme as JSON has it: number formats by name, dataclasses with theirs."""
    if isinstance(value, NumberFormat):
        return {"format": value.name}
    if type(value).__name__ in _CLASSES:
        return {"class": type(value).__name__, **{k: _plain(v) for k, v in _fields(value).items()}}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} in a scheme")


def _value(plain: object) -> Any:
    """The inverse of ``_plain``."""
    if isinstance(plain, list):
        return tuple(_value(item) for item in plain)
    if not isinstance(plain, dict):
        return plain
    if "format" in plain:
        return number_format(plain["format"])
    names = {name: _value(item) for name, item in plain.items() if name != "class"}
    return _CLASSES[plain["class"]](**names)


def _read(path: Path, key: str) -> tuple[dict[str, Kept], dict[str, str]]:
    """ValueError and its like where the file is not sound."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic, length, digest = _PREFIX.unpack(file.read(_PREFIX.size).ljust(_PREFIX.size))
        if magic != _MAGIC or length > min(size, _LARGEST_HEADER):
            raise ValueError("no such file of lowbit's")
        text = file.read(length)
        if hashlib.sha256(text).digest() != digest:
            raise ValueError("its header's checksum is wrong")
        header = json.loads(text)
        first = _first_buffer(length)
        if header["key"] != key:
            raise ValueError("it belongs to another model")
        if size != first + header["buffer_bytes"]:
            raise ValueError(
                f"{thousands(size)} bytes instead of {thousands(first + header['buffer_bytes'])}"
            )
    whole = mapped_file(path, mmap.MADV_WILLNEED)[first:]
    kernels = {kernel.name: kernel for kernel in linear_kernels()}

    def tensor(place: list[Any] | None) -> Tensor:
        assert place is not None, "callers look first"
        dtype, shape, start = DTYPES[place[0]], place[1], place[2]
        count = 1
        for extent in shape:
            count *= extent
        end = start + count * dtype.itemsize
        if start % _ALIGNMENT or not 0 <= start <= end <= len(whole):
            raise ValueError("a buffer lies outside the file")
        return whole[start:end].view(dtype).view(shape)

    rotators: dict[str, Rotator] = {}

    def rotator(values: dict[str, Any]) -> Rotator:
        key = json.dumps(values)
        if key not in rotators:
            size, tensors = values["size"], {name: tensor(place) for name, place in values["tensors"].items()}
            rotation = Rotation(size, divisor=values["divisor"], **tensors)
            if not rotation.is_whole:
                raise ValueError("a rotation is of another size than it says")
            rotators[key] = Rotator(rotation)
        return rotators[key]

    def output(values: dict[str, Any]) -> OutputTransform:
        if "rounded" not in values:
            return rotator(values)
        codes = InputTransform(_value(values["rounded"]), static_scale=tensor(values["scale"]))
        return RoundedOutput(codes)

    def transform(values: dict[str, Any]) -> InputTransform:
        def read(value: Any) -> Any:
            if isinstance(value, dict) and "tensor" in value:
                return tensor(value["tensor"])
            return (
                rotator(value["rotation"])
                if isinstance(value, dict) and "rotation" in value
                else _value(value)
            )

        return InputTransform(**{name: read(value) for name, value in values.items()})

    modules: dict[str, Kept] = {}
    for name, module in header["modules"].items():
        transforms = [transform(values) for values in module["transforms"]]
        weights = [
            kernels[weight["kernel"]].restore(
                _value(weight["scheme"]),
                tuple(weight["shape"]),
                {n: tensor(place) for n, place in weight["buffers"].items()},
                weight["origin"],
            )
            for weight in module["weights"]
        ]
        inputs = [None if number is None else transforms[number] for number in module["inputs"]]
        bias = None if module["bias"] is None else tensor(module["bias"])
        outputs = [None if one is None else output(one) for one in module["outputs"]]
        modules[name] = Kept(weights, inputs, bias, outputs)
    return modules, header["notes"]
