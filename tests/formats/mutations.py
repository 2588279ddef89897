"""Wrong metadata: every leaf of a config and every tensor of a checkpoint made wrong.

A mutated checkpoint must be refused with a ``LowbitError`` or give the same weights as before; anything else
is silent, and must be on the list of what cannot be seen.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.tiny import join_safetensors, split_safetensors
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import Notes, StoredLinear, StoredModule, detect
from lowbit.loading import plan_model

Config = dict[str, object]


@dataclass
class Seed:
    """A sound checkpoint: its config, extra documents and tensors."""

    name: str
    config: Config
    tensors: dict[str, Tensor]
    documents: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    payload: bytes = b""  # of the file that holds these tensors, behind its header
    entries: dict[str, object] = field(default_factory=dict)  # of that header

    @classmethod
    def of(cls, folder: Path) -> Seed:
        documents = {
            path.name: path.read_text()
            for path in folder.glob("*.json")
            if path.name.startswith(("hf_", "quant"))
        }
        config = json.loads((folder / "config.json").read_text())
        path = folder / "model.safetensors"
        entries, payload = split_safetensors(path.read_bytes())
        metadata = entries.pop("__metadata__", {})
        name = f"{folder.parent.name}/{folder.name}"
        return cls(name, config, load_file(path), documents, metadata, payload, entries)

    def write(self, folder: Path, config: Config, tensors: dict[str, Tensor]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.documents.items():
            (folder / name).write_text(text)
        (folder / "config.json").write_text(json.dumps(config))
        file = folder / "model.safetensors"
        if tensors is self.tensors and self.entries:  # nothing to serialize again: half of a verdict's time
            header = self.entries | ({"__metadata__": self.metadata} if self.metadata else {})
            file.write_bytes(join_safetensors(header, self.payload))
            return folder
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, self.metadata)
        return folder

    @cached_property
    def weights(self) -> dict[str, tuple[Tensor, str]]:
        """``weights_of`` the checkpoint as it is."""
        with TemporaryDirectory() as folder:
            return weights_of(self.write(Path(folder), self.config, self.tensors))


def weights_of(folder: Path) -> dict[str, tuple[Tensor, str]]:
    """Each planned module's dequantized weight and what it asks of its input."""
    header = open_checkpoint(str(folder))
    plan = plan_model(header, device="cpu")
    reader = detect(header)(header, Notes())
    with TensorData(header) as data:
        found = {}
        for module in plan.modules:
            read = reader.read(StoredModule(module.name, module.name, module.shape), data)
            found[module.name] = (read.weight.dequantize(), _input(read))
        return found


def _input(read: StoredLinear) -> str:
    rule = read.input
    parts = [] if rule is None else [rule.multiplier, rule.static_scale, rule.static_zero]
    rotations = zip(
        (None if rule is None else rule.rotation, read.output), reversed(read.weight.shape), strict=True
    )
    parts += [None if one is None else one(torch.arange(float(width))) for one, width in rotations]
    return f"{read.weight.scheme.activation} {[None if p is None else p.tolist() for p in parts]}"


def verdict(
    seed: Seed,
    folder: Path,
    config: Config,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
) -> str:
    """ "refused CODE", "equal", or "silent: module". Without ``metadata`` the seed's own."""
    mutated = seed if metadata is None else replace(seed, metadata=metadata)
    try:
        found = weights_of(mutated.write(folder / "mutated", config, tensors))
    except LowbitError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, error
        return f"refused {error.code}"
    for name, (weight, asked) in seed.weights.items():
        if name not in found or not torch.equal(found[name][0], weight) or found[name][1] != asked:
            return f"silent: {name}"
    return "equal"


def leaves(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """The path of every leaf of nested dicts and lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path


def with_leaf(config: Config, path: tuple[object, ...], value: object, remove: bool = False) -> Config:
    """A copy with one leaf changed or gone."""
    changed = copy.deepcopy(config)
    inner: object = changed
    for key in path[:-1]:
        inner = inner[key]  # type: ignore[index]
    if remove:
        del inner[path[-1]]  # type: ignore[union-attr]
    else:
        inner[path[-1]] = value  # type: ignore[index]
    return changed


WRONG_VALUES: tuple[object, ...] = (0, -1, -2, 3, 2**31, 1.5, True, "nonsense", "", None, [], {})


def wrong_values(config: Config, path: tuple[object, ...], generator: random.Random) -> tuple[str, Config]:
    """One leaf replaced by something of the wrong value or type, or removed."""
    value = generator.choice((*WRONG_VALUES, "remove"))
    if value == "remove":
        return f"{path} removed", with_leaf(config, path, None, remove=True)
    return f"{path} = {value!r}", with_leaf(config, path, value)


def _nan(tensor: Tensor) -> Tensor | None:
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or not tensor.numel():
        return None
    changed = tensor.clone()
    changed.view(-1)[tensor.numel() // 2] = float("nan")
    return changed


TENSOR_CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "NaN": _nan,
    "a row more": lambda t: torch.cat((t, t[:1])) if t.ndim else None,
    "a row less": lambda t: t[:-1] if t.ndim and t.shape[0] > 1 else None,
    "transposed": lambda t: t.T if t.ndim == 2 and t.shape[0] != t.shape[1] else None,
    "another axis": lambda t: t.unsqueeze(0) if t.numel() > 1 else None,
    "as int16": lambda t: t.view(torch.uint8).to(torch.int16) if t.dtype.itemsize == 1 else t.to(torch.int16),
    "as float64": lambda t: t.float().double() if t.dtype is not torch.float64 else None,
}
