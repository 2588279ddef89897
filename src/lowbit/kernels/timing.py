"""Timings: how fast each kind of layer runs here beside the same layer in bf16, kept on disk.

A kind is a kernel, a scheme and a shape. Of each, some rows of a real layer (``LayerSample``) are multiplied
with 1, 32 and 256 tokens and so are as many rows of bf16: on the best dense kernel, in turns, so that both
meet the same neighbours, and by torch's own product (x in bfloat16 already), with as many threads, after
them. 256 are timed as a prompt's tokens (``prompt_rows``). The fastest of a few turns counts: what else runs
on the machine only adds time; and the faster of the two bf16s is what a kind is compared with. With one token
the time is that of reading the weight, and a weight that is still in a cache from the turn before would tell
nothing: the caches are swept in between. What runs first then would also wake the other threads and meet cold
code: something small runs before it, and each side is first in every other turn. What seems slower than bf16
gets a second look.

The work is bounded: so much time for each kind, and large numbers of tokens are left out where they would
take longer. The table is one JSON file for all models of a machine, and a second start only reads:

    {"version": 4, "machines": {"AMD EPYC | avx512 | 2 threads | torch 2.13 | lowbit 0.1.0": {
        "cpu_blocks | int4 1x128 f16 | 576 x 576": {"1": [2.1e-05, 4.4e-05, 5e-05], "32": [1e-4, 1e-4]}}}}

Each entry is the seconds of the kind, of our bf16 and of torch's, which is left out where it would take long
(a CPU without bfloat16 instructions). What the file holds is believed only where it has this form.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.kernels import choose, native
from lowbit.kernels.prompt_rows import prompt_rows
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import dense

TOKENS = (1, 32, 256)
SAMPLE_WEIGHTS = 1 << 21  # of a layer: 4 MiB in bf16, more than a core's own cache
COPY = "cpu_dequantized"  # runs what cpu_dense does: our bf16's time is its own
SLOWER = 0.9  # a ratio below is slower; between this and 1 the difference may be the machine's neighbours
_VERSION = 4
_TURNS = 7  # at most, the first not counted
_TORCH_TURNS = 4
_SECONDS_EACH, _SECONDS_AT_MOST = 0.09, 2.25  # of a first look
_SHARES = {1: 0.5, 32: 0.6, 256: 1.0}  # of a kind's time that may be gone after so many tokens
_HOPELESS = 4  # times as long as our bf16: torch is then not asked about more tokens
_GROWTH = 8  # how much longer a run with the next number of tokens takes at most, about
_SWEEP_BYTES = 64 << 20  # at most
_LARGEST_FILE = 4 << 20
_MOST_MACHINES = 16


class Seconds(NamedTuple):
    """Of the kind, of bf16 on our best dense kernel, of torch's bf16 (None: not asked)."""

    mine: float
    dense: float
    torch: float | None = None

    @property
    def bf16(self) -> float:
        """The faster of the two."""
        return self.dense if self.torch is None else min(self.dense, self.torch)

    def faster(self, other: Seconds) -> Seconds:
        """The least of each."""
        known = [seconds for seconds in (self.torch, other.torch) if seconds is not None]
        return Seconds(
            min(self.mine, other.mine), min(self.dense, other.dense), min(known) if known else None
        )


def key_of(kernel: str, scheme: str, shape: tuple[int, ...]) -> str:
    """A kind's name in the table."""
    return f"{kernel} | {scheme} | {shape[-2]} x {shape[-1]}"


@dataclass(frozen=True)
class LayerSample:
    """Some rows of a kind of layer. ``shape``: of the whole layer. ``run``: x (tokens, in) -> (tokens, rows).

    ``scheme``: with its input quantization, which ``run`` does too. ``plain``: an unquantized matrix.
    ``copies``: whether ``cpu_dequantized`` would run it too, with the same inputs.
    """

    kernel: str
    scheme: str
    shape: tuple[int, int]
    rows: int
    run: Callable[[Tensor], Tensor] = field(repr=False)
    plain: bool = False
    copies: bool = False

    @property
    def key(self) -> str:
        """Its name in the table."""
        return key_of(self.kernel, self.scheme, self.shape)


@dataclass(frozen=True)
class Timing:
    """Seconds of a kind and of bf16, by the number of tokens."""

    sample: LayerSample
    seconds: dict[int, Seconds]
    count: int = 1  # layers of this kind

    def ratio(self, tokens: int) -> float:
        """How many times as fast as bf16."""
        seconds = self.seconds[tokens]
        return seconds.bf16 / seconds.mine

    def __str__(self) -> str:
        out, columns = self.sample.shape
        most = max(self.seconds)
        ratios = [f"{times(self.ratio(1))} bf16 with 1 token"]
        for tokens in sorted(self.seconds):  # those between only where they are slower
            if tokens > 1 and (tokens == most or self.ratio(tokens) < SLOWER):
                ratios.append(f"{times(self.ratio(tokens))} with {tokens}")
        return f"{self.sample.scheme} ({out} x {columns}) on {self.sample.kernel}: {', '.join(ratios)}"


@dataclass(frozen=True)
class Slower:
    """A method that is slower than bf16 over all of its layers, with so many tokens at once.

    ``copy``: how much faster our own bf16 is, which ``cpu_dequantized`` would run; None where it would not.
    """

    kernel: str
    scheme: str
    tokens: int
    ratio: float
    copy: float | None = None

    @property
    def plain(self) -> bool:
        """Whether it is torch that is faster in bf16 itself."""
        return self.scheme == "bf16"

    def __str__(self) -> str:
        other = "torch's bf16" if self.plain else "bf16"
        how = f"{times(self.ratio)} {with_tokens(self.tokens)}"
        return f"{self.scheme} on {self.kernel} is slower than {other}: {how}"


def with_tokens(tokens: int) -> str:
    """In words."""
    return "with 1 token" if tokens == 1 else f"with {tokens} tokens"


def times(ratio: float) -> str:
    """In words."""
    return f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2g}x"


def sample_rows(shape: tuple[int, ...]) -> int:
    """Rows of a layer that are timed: whole blocks of 128, enough for every thread, all of a small one."""
    rows = max(SAMPLE_WEIGHTS // shape[-1] // 128 * 128, -(-32 * native.threads() // 128) * 128)
    return min(rows, shape[-2])


def machine(device: torch.device, version: str, threads: int | None = None) -> str:
    """What timings depend on beside the kind of layer; ``threads`` None: as many as are in use."""
    versions = f"torch {torch.__version__} | lowbit {version}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} | {versions}"
    return f"{_cpu_name()} | {native.isa()} | {threads or native.threads()} threads | {versions}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        facts = {
            name.strip(): value.strip()
            for name, _, value in (line.partition(":") for line in first.splitlines())
        }
        if "model name" in facts:
            return facts["model name"]
        if "CPU part" in facts:  # ARM says no name
            return f"ARM implementer {facts.get('CPU implementer')} part {facts['CPU part']}"
    return "unknown CPU"


def cache_bytes() -> int:
    """The size of the largest cache, or a common one where Linux does not say."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes)


class TimingTable:
    """The timings of one machine, out of the file ``path`` and into it."""

    def __init__(self, path: Path, machine: str) -> None:
        self.path = path
        self.machine = machine
        self._kinds = _read(path).get(machine, {})
        self._new: dict[str, dict[int, Seconds]] = {}

    def find(self, sample: LayerSample) -> dict[int, Seconds] | None:
        """What is known of a kind."""
        return self.entry(sample.key)

    def entry(self, key: str) -> dict[int, Seconds] | None:
        """What is known under a name (``key_of``)."""
        return self._new.get(key) or self._kinds.get(key)

    def add(self, sample: LayerSample, seconds: dict[int, Seconds]) -> None:
        """Take note of a kind, for ``save``."""
        self._new[sample.key] = seconds

    def save(self) -> None:
        """Add what is new to the file as it is by now, and replace it whole; OSError where that fails."""
        if not self._new:
            return
        machines = _read(self.path)
        mine = {**machines.pop(self.machine, {}), **self._new}
        kept = dict([*machines.items(), (self.machine, mine)][-_MOST_MACHINES:])
        text = json.dumps({"version": _VERSION, "machines": kept}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=self.path.parent, prefix=f"{self.path.name}-", delete=False
        ) as part:
            temporary = Path(part.name)
            try:
                part.write(text)
                part.flush()
                os.fsync(part.fileno())
                temporary.replace(self.path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def _read(path: Path) -> dict[str, dict[str, dict[int, Seconds]]]:
    """machine -> kind -> tokens -> seconds; what is not of this form counts as not there."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return {}
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        return {}
    found: dict[str, dict[str, dict[int, Seconds]]] = {}
    for name, kinds in _items(document.get("machines")):
        for kind, entries in _items(kinds):
            sound = {
                int(tokens): one for tokens, value in _items(entries) if (one := _seconds(tokens, value))
            }
            if 1 in sound:
                found.setdefault(name, {})[kind] = sound
    return found


def _items(value: object) -> Iterable[tuple[str, object]]:
    return value.items() if isinstance(value, dict) else ()


def _seconds(tokens: str, value: object) -> Seconds | None:
    if tokens not in map(str, TOKENS) or not isinstance(value, list) or len(value) not in (2, 3):
        return None
    if value[2:] == [None]:
        value = value[:2]
    numbers = [float(v) for v in value if isinstance(v, (int, float)) and not isinstance(v, bool)]
    sound = len(numbers) == len(value) and all(math.isfinite(n) and 0 < n < 1e6 for n in numbers)
    return Seconds(*numbers) if sound else None


def time_layers(
    counts: dict[LayerSample, int],
    table: TimingTable,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Each kind with its timing, from the table or measured now; those no time is left for are left out.

    ``counts``: how many layers of each kind the model has.
    """
    for _ in measurements(counts, table, device, clock):
        pass
    return known_timings(counts, table)


def known_timings(counts: dict[LayerSample, int], table: TimingTable) -> list[Timing]:
    """Each kind that the table knows."""
    known = [(sample, table.find(sample), count) for sample, count in counts.items()]
    return [Timing(sample, seconds, count) for sample, seconds, count in known if seconds is not None]


def measurements(
    counts: Iterable[LayerSample],
    table: TimingTable,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[None]:
    """Measure what the table does not know, a kind at a time: stops *before* each, for as long as its caller
    likes, and takes about a tenth of a second when it goes on."""
    missing = [sample for sample in counts if table.find(sample) is None]
    if not missing:
        return
    bench: _Bench | None = None
    each = min(_SECONDS_EACH, _SECONDS_AT_MOST / len(missing))
    for look in range(2):
        spent, slow = 0.0, look > 0
        # Kinds of one shape share their bf16 weight.
        for number, sample in enumerate(sorted(missing, key=lambda s: (s.shape, s.rows)), 1):
            if spent > 1.5 * each * len(missing):
                break
            seen = table.find(sample)
            if seen is None or (slow and any(s.bf16 < SLOWER * s.mine for s in seen.values())):
                yield
                bench = bench or _Bench(device, clock)
                began = clock()
                table.add(sample, _fastest(seen, bench.measure(sample, began - spent + each * number)))
                spent += clock() - began


def _fastest(seen: dict[int, Seconds] | None, again: dict[int, Seconds]) -> dict[int, Seconds]:
    """The faster of two measurements, each side for itself."""
    before = seen or {}
    return {**before, **{tokens: s.faster(before.get(tokens, s)) for tokens, s in again.items()}}


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Bench:
    """Runs a kind and bf16 in turns."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._device = device
        self._clock = clock
        self._sweep = torch.ones(min(cache_bytes(), _SWEEP_BYTES) // 4, device=device)
        self._shape = (0, 0)
        self._bf16: Callable[[Tensor], Tensor] = lambda x: x
        self._torch: Callable[[Tensor], Tensor] = lambda x: x
        self._few = self._input(32, 256)
        small = torch.full((256, 256), 0.01, dtype=torch.bfloat16)
        self._wake, self._wake_torch = self._products(small)

    def measure(self, sample: LayerSample, deadline: float) -> dict[int, Seconds]:
        """Seconds by tokens; with one token always, with more while the deadline allows."""
        began = self._clock()
        self._prepare((sample.rows, sample.shape[1]))
        found: dict[int, Seconds] = {}
        cost, ask_torch = 0.0, True
        for tokens in TOKENS:
            if found and self._clock() + _GROWTH * cost > deadline:
                break
            until = began + _SHARES[tokens] * (deadline - began)
            ours = until - (until - self._clock()) / 3
            x = self._input(tokens, sample.shape[1])
            turns: list[tuple[float, float]] = []
            while len(turns) < _TURNS and (not turns or self._clock() + cost < ours):
                turn = self._clock()
                if tokens == 1:
                    self._sweep_caches()
                    self._wake(self._few)
                if len(turns) % 2:
                    bf16 = self._seconds(self._bf16, x)
                    turns.append((self._seconds(sample.run, x), bf16))
                else:
                    turns.append((self._seconds(sample.run, x), self._seconds(self._bf16, x)))
                cost = self._clock() - turn
            counted = turns[1:] or turns  # the first turn also meets memory for the first time
            mine, dense_seconds = (min(side) for side in zip(*counted, strict=True))
            theirs = self._torch_seconds(x, until) if ask_torch else None
            ask_torch = theirs is not None and theirs < _HOPELESS * dense_seconds
            cost += theirs or 0.0
            found[tokens] = Seconds(mine, dense_seconds, theirs)
        return found

    def _torch_seconds(self, x: Tensor, until: float) -> float:
        """torch's fastest of a few turns, alone: its threads may go on spinning for a while after each."""
        x = x.bfloat16()
        seconds: list[float] = []
        while not seconds or (len(seconds) < _TORCH_TURNS and self._clock() + seconds[-1] < until):
            if x.shape[0] == 1:
                self._sweep_caches()
            with _torch_threads(native.threads()):  # a server leaves torch one
                self._wake_torch(self._few.bfloat16())
                seconds.append(self._seconds(self._torch, x))
        return min(seconds)

    def _sweep_caches(self) -> None:
        """On this thread alone: others of torch's would spin on a core that the next turn needs."""
        with _torch_threads(1):
            self._sweep.sum()

    def _prepare(self, shape: tuple[int, int]) -> None:
        """A bf16 weight of that shape; no kernel's time depends on the numbers in it."""
        if shape == self._shape:
            return
        self._shape = shape
        self._bf16, self._torch = self._products(torch.full(shape, 0.01, dtype=torch.bfloat16))

    def _products(self, matrix: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """x times the matrix, on our best kernel and by torch."""
        shape = (matrix.shape[0], matrix.shape[1])
        weight = QuantizedTensor(dense("bf16"), shape, matrix, origin="timing")
        packed = choose(weight.scheme, shape, self._device).kernel.pack(weight, self._device)
        theirs = matrix.to(self._device)
        return lambda x: packed.kernel.linear(x, packed), lambda x: functional.linear(x, theirs)

    def _input(self, tokens: int, columns: int) -> Tensor:
        dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        return torch.linspace(-1, 1, tokens * columns, device=self._device).view(tokens, columns).to(dtype)

    def _seconds(self, run: Callable[[Tensor], Tensor], x: Tensor) -> float:
        tokens = len(x)
        self._wait()
        began = self._clock()
        with prompt_rows(0 if tokens == TOKENS[-1] else None, tokens):
            run(x)
        self._wait()
        return max(self._clock() - began, 1e-9)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def slower_than_bf16(timings: Iterable[Timing]) -> list[Slower]:
    """Methods whose layers, all together, take longer than bf16 would, by numbers of tokens that all of them
    were timed with; bf16 itself where torch's is faster."""
    methods: dict[tuple[str, str], list[Timing]] = {}
    for timing in timings:
        if not timing.sample.plain or timing.sample.scheme == "bf16":
            methods.setdefault((timing.sample.kernel, timing.sample.scheme), []).append(timing)
    found = []
    for (kernel, scheme), members in methods.items():
        for tokens in sorted(set.intersection(*(set(timing.seconds) for timing in members))):
            mine, bf16, dense_seconds = 0.0, 0.0, 0.0
            for timing in members:
                whole = timing.count * timing.sample.shape[0] / timing.sample.rows
                seconds = timing.seconds[tokens]
                mine += whole * seconds.mine
                bf16 += whole * seconds.bf16
                dense_seconds += whole * seconds.dense
            if bf16 / mine < SLOWER:
                copied = all(timing.sample.copies for timing in members)
                copy = mine / dense_seconds if copied and dense_seconds < SLOWER * mine else None
                found.append(Slower(kernel, scheme, tokens, bf16 / mine, copy))
    return found
