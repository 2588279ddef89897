"""Timings: how fast each kind of layer runs here beside the same layer in bf16, kept on disk.

A kind is a kernel, a scheme and a shape. Of each, some rows of a real layer (``LayerSample``) are multiplied
with 1, 32 and 256 tokens and so are as many rows of bf16 on the best dense kernel, in turns, so that both
meet the same neighbours. The fastest of a few turns counts: what else runs on the machine only adds time.
With one token the time is that of reading the weight, and a weight that is still in a cache from the turn
before would tell nothing: the caches are swept in between. What seems slower than bf16 gets a second look.

The work is bounded: so much time for each kind, and large numbers of tokens are left out where they would
take longer. The table is one JSON file for all models of a machine, and a second start only reads:

    {"version": 1, "machines": {"AMD EPYC | avx512 | 2 threads | lowbit 0.1.0": {
        "cpu_blocks | int4 1x128 f16 | 576 x 576": {"1": [2.1e-05, 4.4e-05], "256": [0.0011, 0.0014]}}}}

Each pair is the seconds of the kind and of bf16. What the file holds is believed only where it has this form.
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

import torch
from torch import Tensor

from lowbit.kernels import choose, native
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import dense

TOKENS = (1, 32, 256)
SAMPLE_WEIGHTS = 1 << 21  # of a layer: 4 MiB in bf16, more than a core's own cache
SLOWER = 0.9  # a ratio below is slower; between this and 1 the difference may be the machine's neighbours
_VERSION = 1
_TURNS = 7  # at most, the first not counted
_SECONDS_EACH, _SECONDS_AT_MOST = 0.06, 1.5  # of a first look
_SHARES = {1: 0.5, 32: 0.6, 256: 1.0}  # of a kind's time that may be gone after so many tokens
_GROWTH = 8  # how much longer a run with the next number of tokens takes at most, about
_SWEEP_BYTES = 64 << 20  # at most
_LARGEST_FILE = 4 << 20
_MOST_MACHINES = 16

Pair = tuple[float, float]  # seconds of the kind, seconds of bf16


@dataclass(frozen=True)
class LayerSample:
    """Some rows of a kind of layer. ``shape``: of the whole layer. ``run``: x (tokens, in) -> (tokens, rows).

    ``scheme``: with its input quantization, which ``run`` does too. ``plain``: an unquantized matrix.
    """

    kernel: str
    scheme: str
    shape: tuple[int, int]
    rows: int
    run: Callable[[Tensor], Tensor] = field(repr=False)
    plain: bool = False

    @property
    def key(self) -> str:
        """Its name in the table."""
        return f"{self.kernel} | {self.scheme} | {self.shape[0]} x {self.shape[1]}"


@dataclass(frozen=True)
class Timing:
    """Seconds of a kind and of bf16, by the number of tokens."""

    sample: LayerSample
    seconds: dict[int, Pair]
    count: int = 1  # layers of this kind

    def ratio(self, tokens: int) -> float:
        """How many times as fast as bf16."""
        mine, bf16 = self.seconds[tokens]
        return bf16 / mine

    def __str__(self) -> str:
        out, columns = self.sample.shape
        ratios = [f"{_times(self.ratio(1))} bf16 with 1 token"]
        if (most := max(self.seconds)) > 1:
            ratios.append(f"{_times(self.ratio(most))} with {most}")
        return f"{self.sample.scheme} ({out} x {columns}) on {self.sample.kernel}: {', '.join(ratios)}"


@dataclass(frozen=True)
class Slower:
    """A method that is slower than bf16 over all of its layers, with so many tokens at once."""

    kernel: str
    scheme: str
    tokens: int
    ratio: float

    def __str__(self) -> str:
        tokens = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        return f"{self.scheme} on {self.kernel} is slower than bf16: {_times(self.ratio)} with {tokens}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2g}x"


def sample_rows(shape: tuple[int, ...]) -> int:
    """Rows of a layer that are timed: whole blocks of 128, enough for every thread, all of a small one."""
    rows = max(SAMPLE_WEIGHTS // shape[-1] // 128 * 128, -(-32 * native.threads() // 128) * 128)
    return min(rows, shape[-2])


def machine(device: torch.device, version: str) -> str:
    """What timings depend on beside the kind of layer."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} | lowbit {version}"
    return f"{_cpu_name()} | {native.isa()} | {native.threads()} threads | lowbit {version}"


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
        self._new: dict[str, dict[int, Pair]] = {}

    def find(self, sample: LayerSample) -> dict[int, Pair] | None:
        """What is known of a kind."""
        return self._new.get(sample.key) or self._kinds.get(sample.key)

    def add(self, sample: LayerSample, seconds: dict[int, Pair]) -> None:
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


def _read(path: Path) -> dict[str, dict[str, dict[int, Pair]]]:
    """machine -> kind -> tokens -> seconds; what is not of this form counts as not there."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return {}
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        return {}
    found: dict[str, dict[str, dict[int, Pair]]] = {}
    for name, kinds in _items(document.get("machines")):
        for kind, entries in _items(kinds):
            pairs = {int(tokens): pair for tokens, value in _items(entries) if (pair := _pair(tokens, value))}
            if 1 in pairs:
                found.setdefault(name, {})[kind] = pairs
    return found


def _items(value: object) -> Iterable[tuple[str, object]]:
    return value.items() if isinstance(value, dict) else ()


def _pair(tokens: str, value: object) -> Pair | None:
    if tokens not in map(str, TOKENS) or not isinstance(value, list) or len(value) != 2:
        return None
    numbers = [float(v) for v in value if isinstance(v, (int, float)) and not isinstance(v, bool)]
    sound = len(numbers) == 2 and all(math.isfinite(n) and 0 < n < 1e6 for n in numbers)
    return (numbers[0], numbers[1]) if sound else None


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
            if seen is None or (slow and any(bf16 < SLOWER * mine for mine, bf16 in seen.values())):
                yield
                bench = bench or _Bench(device, clock)
                began = clock()
                table.add(sample, _fastest(seen, bench.measure(sample, began - spent + each * number)))
                spent += clock() - began


def _fastest(seen: dict[int, Pair] | None, again: dict[int, Pair]) -> dict[int, Pair]:
    """The faster of two measurements, each side for itself."""
    found = dict(seen or {})
    for tokens, (mine, bf16) in again.items():
        before = found.get(tokens, (mine, bf16))
        found[tokens] = (min(mine, before[0]), min(bf16, before[1]))
    return found


class _Bench:
    """Runs a kind and bf16 in turns."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._device = device
        self._clock = clock
        self._sweep = torch.ones(min(cache_bytes(), _SWEEP_BYTES) // 4, device=device)
        self._shape = (0, 0)
        self._bf16: Callable[[Tensor], Tensor] = lambda x: x

    def measure(self, sample: LayerSample, deadline: float) -> dict[int, Pair]:
        """Seconds by tokens; with one token always, with more while the deadline allows."""
        began = self._clock()
        self._prepare((sample.rows, sample.shape[1]))
        found: dict[int, Pair] = {}
        cost = 0.0
        for tokens in TOKENS:
            if found and self._clock() + _GROWTH * cost > deadline:
                break
            until = began + _SHARES[tokens] * (deadline - began)
            x = self._input(tokens, sample.shape[1])
            turns: list[Pair] = []
            while len(turns) < _TURNS and (not turns or self._clock() + cost < until):
                turn = self._clock()
                if tokens == 1:
                    self._sweep.sum()
                turns.append((self._seconds(sample.run, x), self._seconds(self._bf16, x)))
                cost = self._clock() - turn
            counted = turns[1:] or turns  # the first turn also meets memory for the first time
            mine, bf16 = zip(*counted, strict=True)
            found[tokens] = (min(mine), min(bf16))
        return found

    def _prepare(self, shape: tuple[int, int]) -> None:
        """A bf16 weight of that shape; no kernel's time depends on the numbers in it."""
        if shape == self._shape:
            return
        codes = torch.full(shape, 0.01, dtype=torch.bfloat16)
        weight = QuantizedTensor(dense("bf16"), shape, codes, origin="timing")
        packed = choose(weight.scheme, shape, self._device).kernel.pack(weight, self._device)
        self._shape, self._bf16 = shape, lambda x: packed.kernel.linear(x, packed)

    def _input(self, tokens: int, columns: int) -> Tensor:
        dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        return torch.linspace(-1, 1, tokens * columns, device=self._device).view(tokens, columns).to(dtype)

    def _seconds(self, run: Callable[[Tensor], Tensor], x: Tensor) -> float:
        self._wait()
        began = self._clock()
        run(x)
        self._wait()
        return max(self._clock() - began, 1e-9)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def slower_than_bf16(timings: Iterable[Timing]) -> list[Slower]:
    """Methods whose layers, all together, take longer than bf16 would: with one token or with the most."""
    methods: dict[tuple[str, str], list[Timing]] = {}
    for timing in timings:
        if not timing.sample.plain:
            methods.setdefault((timing.sample.kernel, timing.sample.scheme), []).append(timing)
    found = []
    for (kernel, scheme), members in methods.items():
        common = set.intersection(*(set(timing.seconds) for timing in members))
        for tokens in sorted({min(common), max(common)}):
            mine, bf16 = 0.0, 0.0
            for timing in members:
                whole = timing.count * timing.sample.shape[0] / timing.sample.rows
                mine += whole * timing.seconds[tokens][0]
                bf16 += whole * timing.seconds[tokens][1]
            if bf16 / mine < SLOWER:
                found.append(Slower(kernel, scheme, tokens, bf16 / mine))
    return found
