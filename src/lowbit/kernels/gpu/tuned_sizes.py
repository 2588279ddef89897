"""Sizes of launches that were measured on a GPU, in place of those that ``programs`` reckons.

A JSON file for each kind of GPU, named after it: those that come with lowbit lie under ``tuned/``, those of
the user (``benchmarks/tune_gpu.py`` writes them) in a folder that ``look_in`` names, and go first:

    {"gpu": "NVIDIA H100 80GB HBM3", "products": [
        {"bits": 4, "tile": 64, "kind": "whole", "rows": 4096, "columns": 4096,
         "tokens": 8, "height": 64, "splits": 4, "warps": 4, "stages": 4}, …]}

``tokens``: what was measured; products of more than half as many up to so many are launched so too. Sizes
change the order of sums and nothing else. What is not known here, or out of range, is left out, and so is a
whole file that cannot be read; the log says it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from lowbit.errors import printable
from lowbit.kernels.gpu.weight_layout import WIDTHS, Layout

_log = logging.getLogger("lowbit")

_COMES_WITH = Path(__file__).parent / "tuned"
_LARGEST_FILE = 4 << 20
MOST_STAGED = 96 << 10  # bytes that the loads of a program may take of shared memory
_RANGES = {
    "bits": range(1, 9),
    "tile": (16, 32, 64),
    "rows": range(1, 1 << 31),
    "columns": range(1, 1 << 31),
    "tokens": range(1, 1 << 16),
    "height": (32, 64, 128, 256),
    "splits": range(1, 1 << 10),
    "warps": (1, 2, 4, 8),
    "stages": range(1, 9),
}


@dataclass(frozen=True)
class Product:
    """A product of a packed weight, as far as sizes depend on it."""

    bits: int
    tile: int
    kind: str
    rows: int
    columns: int

    @staticmethod
    def of(layout: Layout) -> Product:
        """With a weight in this layout."""
        return Product(layout.bits, layout.tile, layout.kind, *layout.shape)


@dataclass(frozen=True)
class Sizes:
    """``height`` rows a program, ``splits`` of the columns, and how it is compiled."""

    height: int
    splits: int
    warps: int
    stages: int


Known = dict[Product, dict[int, Sizes]]  # by tokens

_folders: list[Path] = []
_tried: list[Sizes] = []


def look_in(folder: Path) -> None:
    """Read the user's files there too."""
    if folder not in _folders:
        _folders.append(folder)
        known_of.cache_clear()


@contextmanager
def trying(sizes: Sizes) -> Iterator[None]:
    """Launch every product so inside this block."""
    _tried.append(sizes)
    try:
        yield
    finally:
        _tried.pop()


def sizes_of(layout: Layout, tokens: int, device: torch.device) -> Sizes | None:
    """What was measured for so many tokens on the device, if anything was."""
    if _tried:
        return _tried[-1]
    known = known_of(gpu_name(device))
    if not known:
        return None
    measured = known.get(Product.of(layout), {})
    near = min((count for count in measured if count // 2 < tokens <= count), default=0)
    return measured.get(near)


@cache
def gpu_name(device: torch.device) -> str:
    """What torch calls a GPU; "" of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def file_name(gpu: str) -> str:
    """Of a kind of GPU."""
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_") + ".json"


@cache
def known_of(gpu: str) -> Known:
    """All that files say of a kind of GPU."""
    found: Known = {}
    if gpu:
        for folder in (_COMES_WITH, *_folders):
            for product, sizes in _read(folder / file_name(gpu), gpu).items():
                found.setdefault(product, {}).update(sizes)
    return found


def write(path: Path, gpu: str, known: Known) -> None:
    """A file of what is known, with what it held of other products."""
    held = _read(path, gpu)
    for product, sizes in known.items():
        held.setdefault(product, {}).update(sizes)
    products = [
        {**asdict(product), "tokens": tokens, **asdict(sizes)}
        for product, measured in held.items()
        for tokens, sizes in sorted(measured.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(entry) for entry in products)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(f'{{"gpu": {json.dumps(gpu)}, "products": [\n{lines}\n]}}\n', encoding="utf-8")
    temporary.replace(path)
    known_of.cache_clear()


def _read(path: Path, gpu: str) -> Known:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"more than {_LARGEST_FILE} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("gpu") != gpu:
            raise ValueError(f"not of {gpu}")
        entries = document.get("products")
        if not isinstance(entries, list):
            raise ValueError("no list of products")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("lowbit: %s is left out: %s", path, printable(error, 200))
        return {}
    found: Known = {}
    unknown: list[object] = []
    for entry in entries:
        read = _entry(entry)
        if read is None:
            unknown.append(entry)
        else:
            product, tokens, sizes = read
            found.setdefault(product, {})[tokens] = sizes
    if unknown:
        _log.warning(
            "lowbit: %s: %d of %d entries are left out, the first is %s",
            path,
            len(unknown),
            len(entries),
            printable(json.dumps(unknown[0]), 200),
        )
    return found


def _entry(entry: object) -> tuple[Product, int, Sizes] | None:
    """None where it is none."""
    if not isinstance(entry, dict) or set(entry) != {*_RANGES, "kind"} or not isinstance(entry["kind"], str):
        return None
    if not all(type(entry[name]) is int and entry[name] in allowed for name, allowed in _RANGES.items()):
        return None
    numbers = {name: entry[name] for name in _RANGES}
    product = Product(numbers["bits"], numbers["tile"], entry["kind"], numbers["rows"], numbers["columns"])
    sizes = Sizes(numbers["height"], numbers["splits"], numbers["warps"], numbers["stages"])
    return (product, numbers["tokens"], sizes) if staged(product, numbers["tokens"], sizes) else None


def staged(product: Product, tokens: int, sizes: Sizes) -> bool:
    """Whether a program's loads fit into the shared memory of any GPU: of a run, and its columns of x."""
    run = product.tile * (8 // WIDTHS[product.bits][0])
    step = sizes.height * run * product.bits // 8 + 2 * min(max(tokens, 16), 128) * run
    return sizes.stages * step <= MOST_STAGED
