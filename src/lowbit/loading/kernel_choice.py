"""--linear-kernel and the timing table: which kernel each layer of a model gets, and what the log says of it.

    --linear-kernel auto                                        preference and timings (kernels.kernel_choice)
    --linear-kernel cpu_dequantized                             all layers that such a kernel is for
    --linear-kernel "*.down_proj=cpu_dequantized,lm_head=auto"  by a recipe's patterns, the first that matches

A kernel named for a layer that it refuses is E0414. A bare name is for quantized layers or for unquantized
ones, as its kernel is; the others stay with auto.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import torch

from lowbit.checkpoint.embedded import cache_directory
from lowbit.errors import LowbitError, printable
from lowbit.kernels import Choice, LinearKernel, ParticularKernel, Use, choose
from lowbit.kernels.kernel_choice import Entry, chosen, kernel_called, named, no_timings, rivals
from lowbit.kernels.timing import LayerSample, TimingTable, key_of, machine, measurements
from lowbit.numerics.scheme import Scheme
from lowbit.quantize.recipe import checked_pattern, matches

_log = logging.getLogger("lowbit")

FILE = "kernel-timings.json"
AUTO = "auto"
# Of the timings on disk: no use is made of them; they count; and those that are missing and would decide
# something are taken while the model loads.
Timings = Literal["unused", "kept", "measured"]
_SECONDS = 1.5  # of measuring while a model loads, at most


@dataclass(frozen=True)
class Wanted:
    """The kernel a rule of ``--linear-kernel`` names for a module, or auto; ``rule``: as written.

    ``lookup``: whether the module is one whose rows are looked up.
    """

    module: str
    kernel: str = AUTO
    rule: str = AUTO
    lookup: bool = False

    @property
    def by_pattern(self) -> bool:
        """Whether the rule is about this module and not about all."""
        return self.rule != self.kernel

    def same_as(self, other: Wanted) -> bool:
        """Whether the two may be one weight."""
        return (self.kernel, self.rule) == (other.kernel, other.rule)


@dataclass(frozen=True)
class KernelRules:
    """``--linear-kernel``, parsed: the first pattern that matches a module, else ``default``."""

    default: str = AUTO
    rules: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> KernelRules:
        """E0103 where a kernel does not exist, E0404 where a pattern makes no sense."""
        default, rules = "", []
        for entry in text.split(","):
            pattern, equals, name = (word.strip() for word in entry.rpartition("="))
            if name != AUTO:
                kernel_called(name)
            if equals:
                rules.append((checked_pattern(pattern, f"--linear-kernel {printable(text)}"), name))
            elif default:
                raise LowbitError(
                    "E0103",
                    f"--linear-kernel {printable(text)}: {default} and {name} are both for all layers",
                )
            else:
                default = name
        return cls(default or AUTO, tuple(rules))

    @property
    def written(self) -> list[str]:
        """Every rule as ``Wanted.rule`` has it, but auto."""
        bare = [] if self.default == AUTO else [self.default]
        return [f"{pattern}={kernel}" for pattern, kernel in self.rules] + bare

    def of(self, name: str, role: str) -> Wanted:
        """What is wanted for a module."""
        for pattern, kernel in self.rules:
            if matches(pattern, name, role):
                return Wanted(name, kernel, f"{pattern}={kernel}")
        return Wanted(name, self.default, self.default)


class KernelChoice:
    """Chooses a kernel for each weight. The choice depends on the weight's kind, the rules and the table."""

    def __init__(
        self, rules: KernelRules | None = None, timings: Timings = "unused", threads: int | None = None
    ) -> None:
        """``threads``: those of the timings; None: as many as native code has."""
        self.rules = rules or KernelRules()
        self.inputs: torch.dtype | None = None  # what layers are given, once it is known
        self._timings = timings
        self._threads = threads
        self._tables: dict[str, TimingTable] = {}
        self._chosen: dict[tuple[object, ...], Choice] = {}
        self._spent = 0.0
        self._lines: Counter[str] = Counter()
        self._used: set[str] = set()  # rules that were about something

    def table(self, device: torch.device) -> TimingTable | None:
        """The timings of this machine; None where they do not count.

        On a GPU they would be the time Python takes to launch a sample.
        """
        if self._timings == "unused" or device.type != "cpu":
            return None
        if device.type not in self._tables:
            self._tables[device.type] = timing_table(device, self._threads)
        return self._tables[device.type]

    def wanted(self, module: str, role: str) -> Wanted:
        """What the rules say of a module."""
        found = replace(self.rules.of(module, role), lookup=role == "embedding")
        if found.by_pattern:
            self._used.add(found.rule)
        return found

    def of(self, wanted: Wanted, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> Choice:
        """The kernel of a weight of that shape as it is packed; ``scheme`` with what is done to inputs."""
        name = self._name(wanted, scheme)
        if name != AUTO:
            self._used.add(wanted.rule)
        use = Use(wanted.lookup, self.inputs)
        key = (name, scheme, shape, device.type, use)
        if key not in self._chosen:
            table = self.table(device)
            entry: Entry = no_timings if table is None else table.entry
            if name == AUTO:
                self._chosen[key] = chosen(scheme, shape, device, entry, use)
            else:
                found = named(scheme, shape, device, name, entry, use)
                if isinstance(found, str):
                    raise _refused(wanted, scheme, shape, found)
                self._chosen[key] = found
        return self._chosen[key]

    def ratios(
        self, kernel: LinearKernel, scheme: Scheme, shape: tuple[int, ...], device: torch.device
    ) -> tuple[tuple[int, float], ...]:
        """(tokens, times as fast as bf16) of a kind the table knows."""
        table = self.table(device)
        found = None if table is None else table.entry(key_of(kernel.name, str(scheme), shape))
        return tuple((tokens, s.bf16 / s.mine) for tokens, s in sorted((found or {}).items()))

    def untimed(
        self, wanted: Wanted, scheme: Scheme, shape: tuple[int, ...], device: torch.device
    ) -> LinearKernel | None:
        """The kernel to time before there is a choice; None where there is none, or no time left."""
        table = self.table(device)
        if self._timings != "measured" or table is None or self._spent > _SECONDS:
            return None
        name = self._name(wanted, scheme)
        use = Use(wanted.lookup, self.inputs)
        if name != AUTO or (name, scheme, shape, device.type, use) in self._chosen:
            return None
        kernel = choose(replace(scheme, activation=None), shape, device, use).kernel
        if not rivals(scheme, shape, device, kernel) or table.entry(key_of(kernel.name, str(scheme), shape)):
            return None
        return kernel

    def measure(self, sample: LayerSample, device: torch.device) -> None:
        """Take a kind's timing, for the choice and for the table."""
        table = self.table(device)
        assert table is not None, "untimed() was asked first"
        began = time.perf_counter()
        for _ in measurements([sample], table, device):
            pass
        self._spent += time.perf_counter() - began
        self._chosen.clear()

    def note(self, choice: Choice, scheme: Scheme, shape: tuple[int, ...]) -> None:
        """A layer runs so: for the log, where it was not the only way."""
        if choice.by or choice.contested:
            out, columns = shape[-2:]
            losers = "; ".join(f"not {loser.kernel}: {loser.reason}" for loser in choice.losers)
            by = f" {choice.by}" if choice.by else ""
            self._lines[f"{scheme} ({out} x {columns}) runs on {choice.kernel.name}{by}; {losers}"] += 1

    def finish(self) -> None:
        """Once a model is loaded or planned: what was measured is kept, what was chosen is said."""
        for table in self._tables.values():
            keep(table)
        for line, count in self._lines.items():
            _log.info("lowbit: %s%s", line, f" ({count} layers)" if count > 1 else "")
        self._lines.clear()
        for rule in self.rules.written:
            if rule not in self._used:
                text = "lowbit: --linear-kernel %s is about no layer of this model; lowbit inspect lists them"
                _log.warning(text, printable(rule))

    @staticmethod
    def _name(wanted: Wanted, scheme: Scheme) -> str:
        """The kernel's name, or auto: for layers that a bare name is not about, too."""
        if wanted.kernel == AUTO or wanted.by_pattern:
            return wanted.kernel
        other = "quantized" if scheme.is_dense else "unquantized"
        kernel = kernel_called(wanted.kernel)
        if wanted.lookup and isinstance(kernel, ParticularKernel) and not kernel.looks_up:
            return AUTO
        return AUTO if kernel.runs == other else wanted.kernel


def _refused(wanted: Wanted, scheme: Scheme, shape: tuple[int, ...], reason: str) -> LowbitError:
    size = " x ".join(map(str, shape))
    way_out = "leave it out of the pattern"
    if not wanted.by_pattern:
        way_out = f"use --linear-kernel {wanted.rule},{printable(wanted.module)}=auto"
    return LowbitError(
        "E0414",
        f"{printable(wanted.module)}: --linear-kernel {printable(wanted.rule)}: {wanted.kernel} cannot run "
        f"{scheme} ({size}): {reason}; {way_out}, or auto",
    )


def timing_table(device: torch.device, threads: int | None = None) -> TimingTable:
    """The timings kept in the cache folder."""
    return TimingTable(cache_directory() / FILE, machine(device, _version(), threads))


def keep(table: TimingTable) -> None:
    """Write what is new; serving never fails by it."""
    try:
        table.save()
    except OSError as error:
        _log.info("lowbit: kernel timings are not kept: %s", error.strerror or error)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("lowbit")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
