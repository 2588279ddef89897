"""Rotations that a compressed-tensors checkpoint asks for at run time: QuIP, QuaRot, SpinQuant.

    transform_config: {config_groups: {name: {type, apply: [{targets, location, inverse, ignore}], head_dim,
                                              randomize, precision, requires_grad}}}

    location       what happens                                   when
    input          x R before the module quantizes it             at run time
    output         y R, y with its bias                           at run time
    weight_input, weight_output                                   was done to the weight before it was saved
    q_attn, k_cache    the heads of Q and of K, after their       at run time
                       rotary embedding

R is block diagonal, its one block ``head_dim`` wide, or as wide as what it rotates where there is none. With
M the stored ``<module>.<name>_<location>.weight`` (n, n):

    hadamard, random-hadamard    R = M / sqrt(n); ``inverse``: M^T; ``randomize``: M[p][:, p], p in ``.perm``
    random-matrix                R = M, which is stored inverted already where ``inverse`` says so

All modules of a group with an equal n share one M, and a file holds it once, beside the first of them. A
``hadamard`` without its tensor is Sylvester's.

The tool computes in ``precision``, lowbit in float32 always; R is the same. Two rotations of one input, and
those of an embedding or of anything but linear layers and attention, are refused.

Defined by compressed-tensors 0.10 to 0.20 (``transform``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, printable
from lowbit.formats import StoredModule
from lowbit.formats.matching import Keys, regex, regex_or_exact, sole_name_or_exact, strings
from lowbit.formats.quantization_config import quantization_config
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import RotationScheme

METHODS = ("compressed-tensors", "compressed_tensors", "sparseml")
_KINDS = ("hadamard", "random-hadamard", "random-matrix")
_OFFLINE = ("weight_input", "weight_output")
_HEADS = ("q_attn", "k_cache")
_LOCATIONS = ("input", "output", *_OFFLINE, *_HEADS)
_GROUP_KEYS = frozenset(("type", "apply", "randomize", "requires_grad", "head_dim", "precision"))
_STEP_KEYS = frozenset(("targets", "location", "inverse", "ignore"))
_FLOATS = ("F32", "F64", "BF16", "F16")
_EMBEDDINGS = frozenset(("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings"))
_LARGEST = 1 << 15  # a block of 32,768 columns is a matrix of 4 GiB


@dataclass(frozen=True)
class Step:
    """One entry of ``apply`` that is done at run time. ``size``: of a block; 0: what it rotates is one."""

    group: str
    kind: str
    size: int
    randomize: bool
    location: str
    inverse: bool
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    place: str

    def target_of(self, names: tuple[str, ...], kind: str) -> str | None:
        """The target that names a module of class ``kind`` known under ``names``; None where none does."""
        if kind in self.ignore or self._ignored.first(*names) is not None:
            return None
        if (found := self._named.first(*names)) is not None:
            return found
        is_attention = kind == "Attention"
        for target in self.targets:
            if target == kind or (is_attention and target.endswith(kind) and "." not in target):
                return target
        return None

    @cached_property
    def _ignored(self) -> Keys[str]:
        return Keys([(key, key) for key in self.ignore], regex_or_exact, sole_name_or_exact)

    @cached_property
    def _named(self) -> Keys[str]:
        return Keys([(target, target) for target in self.targets], regex_or_exact, sole_name_or_exact)


@dataclass
class Transforms:
    """The steps of one checkpoint at run time, and which of their targets have met a layer."""

    header: CheckpointHeader
    steps: tuple[Step, ...] = ()
    _met: set[tuple[Step, str]] = field(default_factory=set)
    _read: dict[tuple[str, ...], Rotation] = field(default_factory=dict)

    @classmethod
    def of(cls, header: CheckpointHeader) -> Transforms:
        """Those of a compressed-tensors config; no steps where a checkpoint has none."""
        found = None if header.container == "gguf" else quantization_config(header)
        if found is None or found.method not in METHODS:
            return cls(header)
        nested = found.values.get("quantization_config")
        inner = nested if isinstance(nested, dict) else found.values
        steps = parse_steps(
            found.values.get("transform_config") or inner.get("transform_config"), found.place
        )
        return cls(header, steps)

    def step_of(self, module: StoredModule, location: str) -> Step | None:
        """What rotates the module's input or output; E0218 where two do, E0212 where blocks do not fit."""
        names = tuple(dict.fromkeys((module.stored, module.name)))
        step = self._one(names, _class_of(module), location)
        if step is None:
            return None
        width = module.shape[1 if location == "input" else 0]
        if _class_of(module) == "Embedding":
            raise self._refused(step, f"rotates the {location} of the embedding {module.name}")
        if step.size and width % step.size:
            raise LowbitError(
                "E0212",
                f"{step.place}.head_dim is {step.size}, which does not divide the {width} "
                f"{'inputs' if location == 'input' else 'outputs'} of {module.name}",
            )
        self._check_tensors(step, module.stored, step.size or width)
        return step

    def schemes(self, module: StoredModule) -> tuple[RotationScheme | None, RotationScheme | None]:
        """How the module's input and output are rotated, from the config and headers alone."""
        found = []
        for location, width in (("input", module.shape[1]), ("output", module.shape[0])):
            step = self.step_of(module, location)
            found.append(None if step is None else RotationScheme(step.kind, step.size or width))
        return found[0], found[1]

    def tensors_of(self, module: StoredModule) -> list[str]:
        """The matrices that are stored beside the module."""
        found = []
        for location in ("input", "output"):
            step = self.step_of(module, location)
            found += [] if step is None else self._own(step, module.stored)
        return found

    def read(self, module: StoredModule, location: str, data: TensorData) -> Rotation | None:
        """The rotation itself, one object for all modules that share it."""
        step = self.step_of(module, location)
        if step is None:
            return None
        width = module.shape[1 if location == "input" else 0]
        return self._rotation(step, module.stored, step.size or width, data)

    def meet(self, module: StoredModule) -> None:
        """Remember which targets name the module, which is a layer of the model."""
        names = tuple(dict.fromkeys((module.stored, module.name)))
        for step in self.steps:
            target = None if step.location in _HEADS else step.target_of(names, _class_of(module))
            if target is not None:
                self._met.add((step, target))

    def heads(self, attention: str, stored: str, head_dim: int) -> list[tuple[str, Step]]:
        """(location, step) of what rotates the heads of the attention, which is then met."""
        found = []
        for location in _HEADS:
            step = self._one((stored, attention), "Attention", location)
            if step is None:
                continue
            if not step.size or head_dim % step.size:
                raise LowbitError(
                    "E0212",
                    f"{step.place}.head_dim is {step.size or 'missing'}; heads of {attention} have "
                    f"{head_dim} numbers, of which it must be a divisor",
                )
            self._check_tensors(step, stored, step.size)
            self._met.add((step, step.target_of((stored, attention), "Attention") or ""))
            found.append((location, step))
        return found

    def tensors_of_heads(self, attention: str, stored: str, head_dim: int) -> list[str]:
        """The matrices that are stored beside the attention."""
        steps = self.heads(attention, stored, head_dim)
        return [name for _, step in steps for name in self._own(step, stored)]

    def read_heads(
        self, attention: str, stored: str, head_dim: int, data: TensorData
    ) -> tuple[Rotation | None, Rotation | None]:
        """What Q's and K's heads are rotated by."""
        steps = dict(self.heads(attention, stored, head_dim))
        q, k = (
            self._rotation(steps[location], stored, steps[location].size, data) if location in steps else None
            for location in _HEADS
        )
        return q, k

    @property
    def rotates_heads(self) -> str:
        """The locations at which heads of Q and K are rotated, in words."""
        return ", ".join(dict.fromkeys(step.location for step in self.steps if step.location in _HEADS))

    def refuse_unmet(self) -> None:
        """E0218 where a step names what is no layer that can be rotated: nothing may be left out."""
        for step in self.steps:
            left = [target for target in step.targets if (step, target) not in self._met]
            if left:
                kind = "attention" if step.location in _HEADS else "linear layer"
                raise self._refused(
                    step,
                    f"rotates (location {step.location}) what {printable(repr(left[0]), 60)} targets, which "
                    f"is no {kind} that lowbit can rotate",
                )

    def refuse_tied(self, head: str = "lm_head") -> None:
        """E0218 where the output head is the embedding's matrix, and yet is to be rotated."""
        for step in self.steps:
            if step.location in ("input", "output") and step.target_of((head,), "Linear"):
                raise self._refused(
                    step, f"rotates the {step.location} of {head}, which is the embedding here"
                )

    def _one(self, names: tuple[str, ...], kind: str, location: str) -> Step | None:
        at = (step for step in self.steps if step.location == location)
        found = [step for step in at if step.target_of(names, kind)]
        if len(found) > 1:
            raise self._refused(found[1], f"rotates the {location} of {names[-1]} a second time")
        return found[0] if found else None

    def _refused(self, step: Step, what: str) -> LowbitError:
        return LowbitError(
            "E0218",
            f"{step.place} {what}, which lowbit does not do. Use a quantization of the same model without "
            "such transforms",
        )

    def _own(self, step: Step, stored: str) -> list[str]:
        names = (f"{stored}.{step.group}_{step.location}.{suffix}" for suffix in ("weight", "perm"))
        return [name for name in names if name in self.header.tensors]

    def _check_tensors(self, step: Step, stored: str, size: int) -> None:
        """That the matrix beside the module has the size of a block; E0213 where it does not."""
        if size > _LARGEST:
            raise LowbitError("E0218", f"{step.place}: a block of {size} columns is too large to be rotated")
        for name in self._own(step, stored):
            entry = self.header.tensors[name]
            dtypes, shape = (_FLOATS, (size, size)) if name.endswith("weight") else (("I64", "I32"), (size,))
            if entry.shape != shape or entry.dtype not in dtypes:
                raise LowbitError(
                    "E0213",
                    f"{entry.file.name}: tensor {name!r} is {entry.dtype} {list(entry.shape)}; a {step.kind} "
                    f"rotation of {size} columns stores {' or '.join(dtypes)} {list(shape)}",
                )

    def _stored_at(self, step: Step, stored: str, size: int, suffix: str) -> list[str]:
        """The module's own tensor, or those of the group that can be the one it shares."""
        own = f"{stored}.{step.group}_{step.location}.{suffix}"
        if own in self.header.tensors:
            return [own]
        shape = (size, size) if suffix == "weight" else (size,)
        locations = [
            other.location
            for other in self.steps
            if other.group == step.group and (step.kind != "random-matrix" or other.inverse == step.inverse)
        ]
        ends = tuple(f".{step.group}_{location}.{suffix}" for location in dict.fromkeys(locations))
        return sorted(
            name
            for name, entry in self.header.tensors.items()
            if name.endswith(ends) and entry.shape == shape
        )

    def _tensor(self, step: Step, stored: str, size: int, suffix: str, data: TensorData) -> Tensor | None:
        """The one tensor; None where no module of the group has it, E0218 where modules differ."""
        names = self._stored_at(step, stored, size, suffix)
        if not names:
            return None
        found = data.tensor(names[0])
        for other in names[1:]:
            if not torch.equal(data.tensor(other), found):
                raise LowbitError(
                    "E0218",
                    f"{self.header.file_of(other)}: {step.place} has several matrices ({names[0]!r}, "
                    f"{other!r} …) and {stored!r} has none: which it shares cannot be told",
                )
        return found

    def _rotation(self, step: Step, stored: str, size: int, data: TensorData) -> Rotation:
        turned = step.inverse and step.kind != "random-matrix"
        names = self._stored_at(step, stored, size, "weight") + self._stored_at(step, stored, size, "perm")
        key = (step.group, str(size), str(turned), *names)
        if key not in self._read:
            self._read[key] = self._made(step, stored, size, data, turned)
        return self._read[key]

    def _made(self, step: Step, stored: str, size: int, data: TensorData, turned: bool) -> Rotation:
        matrix = self._tensor(step, stored, size, "weight", data)
        perm = self._tensor(step, stored, size, "perm", data) if step.randomize else None
        if step.randomize and perm is None and step.kind != "random-matrix":
            raise self._missing(step, stored, "perm")
        if matrix is None and perm is None and step.kind == "hadamard" and size & (size - 1) == 0:
            return Rotation.hadamard(size)
        if matrix is None:
            raise self._missing(step, stored, "weight")
        matrix = matrix.float()
        if not bool(matrix.isfinite().all()):
            raise LowbitError(
                "E0215",
                f"{self.header.root.name}: the matrix of {step.place} beside {stored!r} holds NaN or "
                "infinity; the file is damaged, download it again",
            )
        if perm is not None and step.kind != "random-matrix":
            if not torch.equal(perm.long().sort().values, torch.arange(size)):
                raise LowbitError(
                    "E0213",
                    f"{self.header.root.name}: the permutation of {step.place} beside {stored!r} is none",
                )
            matrix = matrix[perm.long()][:, perm.long()]
        matrix = matrix.T if turned else matrix
        return Rotation.of(matrix, 1.0 if step.kind == "random-matrix" else math.sqrt(size))

    def _missing(self, step: Step, stored: str, suffix: str) -> LowbitError:
        name = f"{stored}.{step.group}_{step.location}.{suffix}"
        return LowbitError(
            "E0209",
            f"{self.header.root.name}: no file contains {name!r}, nor another module's of that size "
            f"({step.kind} rotation of {step.place})",
        )


def _class_of(module: StoredModule) -> str:
    leaves = {name.rpartition(".")[2] for name in (module.stored, module.name)}
    return "Embedding" if leaves & _EMBEDDINGS else "Linear"


def parse_steps(value: object, place: str) -> tuple[Step, ...]:
    """What is done at run time; E0212 where no tool could have written it, E0218 for other transforms."""
    if not value:
        return ()
    place = f"{place}.transform_config"
    groups = value.get("config_groups") if isinstance(value, dict) else None
    if not isinstance(groups, dict):
        raise LowbitError("E0212", f"{place} must hold an object config_groups")
    found: list[Step] = []
    for name, group in groups.items():
        found += _steps(str(name), group, f"{place}.config_groups.{printable(name, 40)}")
    return tuple(found)


def _steps(name: str, group: object, place: str) -> list[Step]:
    if not isinstance(group, dict):
        raise LowbitError("E0212", f"{place} must be an object")
    _refuse_unknown(group, _GROUP_KEYS, place)
    kind, size, randomize = group.get("type"), group.get("head_dim"), group.get("randomize", False)
    applied = group.get("apply", [])
    if not isinstance(applied, list) or not isinstance(randomize, bool):
        raise LowbitError("E0212", f"{place}: apply must be a list, and randomize true or false")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise LowbitError(
            "E0212", f"{place}.head_dim is {printable(repr(size), 40)}; expected a positive number"
        )
    found = []
    for number, step in enumerate(applied):
        here = f"{place}.apply[{number}]"
        if not isinstance(step, dict):
            raise LowbitError("E0212", f"{here} must be an object")
        _refuse_unknown(step, _STEP_KEYS, here)
        location, inverse = step.get("location"), step.get("inverse", False)
        if location not in _LOCATIONS:
            raise LowbitError(
                "E0212",
                f"{here}.location is {printable(repr(location), 40)}; expected one of "
                f"{', '.join(_LOCATIONS)}",
            )
        if not isinstance(inverse, bool):
            raise LowbitError("E0212", f"{here}.inverse must be true or false")
        targets = strings(step.get("targets"), "targets", here)
        ignore = strings(step.get("ignore"), "ignore", here)
        if not targets:
            raise LowbitError("E0212", f"{here}.targets names no modules")
        for pattern in (*targets, *ignore):
            if pattern.startswith("re:"):
                regex(pattern[3:], "")
        if location in _OFFLINE:
            continue
        if kind not in _KINDS:
            raise LowbitError(
                "E0218",
                f"{place}.type is {printable(repr(kind), 40)}, at run time; lowbit knows "
                f"{', '.join(_KINDS)}. Use a quantization of the same model without transforms",
            )
        found.append(
            Step(name, str(kind), size or 0, randomize, str(location), inverse, targets, ignore, place)
        )
    return found


def _refuse_unknown(value: dict[str, object], known: frozenset[str], place: str) -> None:
    unknown = sorted(set(value) - known)
    if unknown:
        raise LowbitError(
            "E0212",
            f"{place} has the key {printable(unknown[0], 40)!r}, which no version of compressed-tensors "
            "up to 0.20 knows; it may change how x is rotated. Update lowbit, or remove the key",
        )
