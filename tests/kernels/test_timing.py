"""Kernel timings on a clock of the test's own: what is measured, what is kept, what is said, the budget."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowbit.kernels import timing
from lowbit.kernels.timing import (
    LayerSample,
    Seconds,
    Slower,
    Timing,
    TimingTable,
    machine,
    measurements,
    sample_rows,
    slower_than_bf16,
    time_layers,
)

CPU = torch.device("cpu")


class Clock:
    """Time passes only where something says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.runs: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def layer(self, name: str, seconds: Callable[[int, int], float]) -> Callable[[Tensor], Tensor]:
        """A run that takes ``seconds(tokens, how often it ran before)``."""
        count = iter(range(10**6))

        def run(x: Tensor) -> Tensor:
            self.runs.append((name, x.shape[0]))
            self.now += seconds(x.shape[0], next(count))
            return x

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock; bf16 takes 1 ms a token-independent pass and 10 us more a token, torch's twice as long."""
    made = Clock()

    def prepare(bench: timing._Bench, shape: tuple[int, int]) -> None:
        bench._bf16 = made.layer("bf16", lambda tokens, _: 1e-3 + 1e-5 * tokens)
        bench._torch = made.layer("torch", lambda tokens, _: 2e-3 + 2e-5 * tokens)

    monkeypatch.setattr(timing._Bench, "_prepare", prepare)
    monkeypatch.setattr(timing, "_SWEEP_BYTES", 64)
    return made


def sample(
    run: Callable[[Tensor], Tensor],
    scheme: str = "int4 1x32 f16",
    shape: tuple[int, int] = (64, 32),
    kernel: str = "cpu_blocks",
    rows: int = 0,
    plain: bool = False,
) -> LayerSample:
    return LayerSample(kernel, scheme, shape, rows or shape[0], run, plain)


def table(path: Path, name: str = "here") -> TimingTable:
    return TimingTable(path / "timings.json", name)


def never(x: Tensor) -> Tensor:
    raise AssertionError("measured again")


def test_the_line_and_the_ratios(clock: Clock, tmp_path: Path) -> None:
    run = clock.layer("int4", lambda tokens, _: 0.5e-3 + 0.8e-5 * tokens)
    [found] = time_layers({sample(run, "int4 1x128 f16", (576, 576)): 3}, table(tmp_path), CPU, clock)
    assert found.count == 3 and set(found.seconds) == {1, 32, 256}
    assert found.ratio(1) == pytest.approx(1.01 / 0.508) and found.ratio(256) == pytest.approx(3.56 / 2.548)
    line = "int4 1x128 f16 (576 x 576) on cpu_blocks: 2.0x bf16 with 1 token, 1.4x with 256"
    assert str(found) == line
    counted = {tokens: clock.runs.count(("int4", tokens)) for tokens in (1, 32, 256)}
    assert counted == {tokens: clock.runs.count(("bf16", tokens)) for tokens in (1, 32, 256)}
    in_turns = [("int4", 1), ("bf16", 1), ("bf16", 1), ("int4", 1)]
    assert clock.runs[:4] == in_turns, "and each is first in every other one"


def test_a_second_start_only_reads(clock: Clock, tmp_path: Path) -> None:
    first = table(tmp_path)
    kinds = {sample(clock.layer("x", lambda tokens, _: 1e-4 * tokens), shape=(n, 32)): n for n in (16, 48)}
    found = time_layers(kinds, first, CPU, clock)
    first.save()
    again = {sample(never, shape=kind.shape): count for kind, count in kinds.items()}
    read = time_layers(again, table(tmp_path), CPU, clock)
    assert [(t.seconds, t.count, str(t)) for t in read] == [(t.seconds, t.count, str(t)) for t in found]
    for other in ("another CPU", "here | lowbit 9"):
        assert table(tmp_path, other).find(next(iter(kinds))) is None
    assert table(tmp_path).find(sample(never, "int4 1x64 f16", (16, 32))) is None
    assert table(tmp_path).find(sample(never, shape=(16, 32), kernel="reference")) is None


def test_pauses_between_measurements_do_not_count(clock: Clock, tmp_path: Path) -> None:
    """An idle server measures when it can: what it does in between is nobody's budget."""
    run = clock.layer("x", lambda tokens, _: 1e-6 * tokens)
    kinds = [sample(run, shape=(16 * n, 32)) for n in range(1, 5)]
    kept = table(tmp_path)
    steps = 0
    for _ in measurements(kinds, kept, CPU, clock):
        assert sum(kept.find(kind) is not None for kind in kinds) == steps, "it stops before each"
        clock.now += 60
        steps += 1
    assert steps == 4
    assert all(256 in (kept.find(kind) or {}) for kind in kinds), "all with the most tokens"


def test_neighbours_on_the_machine_do_not_count(clock: Clock, tmp_path: Path) -> None:
    """The first turn of all, and every other one, take ten times as long."""
    run = clock.layer("int4", lambda tokens, n: 5e-4 * (10 if n % 2 == 0 else 1))
    [found] = time_layers({sample(run): 1}, table(tmp_path), CPU, clock)
    assert found.seconds[1][0] == pytest.approx(5e-4)


def test_the_faster_bf16_is_what_counts(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's where that is faster, asked with as many threads as native code has."""
    threads: set[int] = set()

    def prepare(bench: timing._Bench, shape: tuple[int, int]) -> None:
        bench._bf16 = clock.layer("bf16", lambda tokens, _: 1e-3)
        fast = clock.layer("torch", lambda tokens, _: 5e-4)
        bench._torch = lambda x: (threads.add(torch.get_num_threads()), fast(x))[1]
        assert bench._torch is not fast

    monkeypatch.setattr(timing._Bench, "_prepare", prepare)
    monkeypatch.setattr(timing.native, "threads", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        [found] = time_layers(
            {sample(clock.layer("x", lambda tokens, _: 1e-3)): 1}, table(tmp_path), CPU, clock
        )
        assert torch.get_num_threads() == 1 and threads == {2}
    finally:
        torch.set_num_threads(before)
    assert found.seconds[1] == pytest.approx(Seconds(1e-3, 1e-3, 5e-4))
    assert found.ratio(1) == pytest.approx(0.5)
    assert str(found).endswith("0.5x bf16 with 1 token, 0.5x with 32, 0.5x with 256")


def test_torch_is_not_waited_for_where_it_is_hopeless(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU without bfloat16 instructions: the other numbers of tokens are still timed, beside our own."""

    def prepare(bench: timing._Bench, shape: tuple[int, int]) -> None:
        bench._bf16 = clock.layer("bf16", lambda tokens, _: 1e-4)
        bench._torch = clock.layer("torch", lambda tokens, _: 5e-4 * tokens)

    monkeypatch.setattr(timing._Bench, "_prepare", prepare)
    [found] = time_layers({sample(clock.layer("x", lambda tokens, _: 5e-5)): 1}, table(tmp_path), CPU, clock)
    assert found.seconds[1].torch == pytest.approx(5e-4)
    assert (found.seconds[32].torch, found.seconds[256].torch) == (None, None)
    assert found.ratio(256) == pytest.approx(2.0)


def test_what_seems_slower_gets_a_second_look(clock: Clock, tmp_path: Path) -> None:
    busy = clock.layer("busy", lambda tokens, n: 0.02 if clock.now < 100.06 else 2e-4)
    slow = clock.layer("slow", lambda tokens, n: 4e-3)
    kinds = {sample(busy, shape=(16, 32)): 1, sample(slow, shape=(32, 32)): 1}
    first, second = time_layers(kinds, table(tmp_path), CPU, clock)
    assert first.ratio(1) > 4 and second.ratio(1) == pytest.approx(1.01 / 4)
    fast = clock.layer("fast", lambda tokens, n: 1e-4)
    time_layers({sample(fast, shape=(48, 32)): 1}, table(tmp_path), CPU, clock)
    assert clock.runs.count(("fast", 1)) == 7, "one look, seven turns"


@pytest.mark.parametrize("count", [1, 6, 40])
@pytest.mark.parametrize("seconds", [1e-5, 3e-3, 0.05])
def test_the_budget(count: int, seconds: float, clock: Clock, tmp_path: Path) -> None:
    run = clock.layer("x", lambda tokens, _: seconds * tokens)
    kinds = {sample(run, shape=(16 * n, 32)): 1 for n in range(1, count + 1)}
    found = time_layers(kinds, table(tmp_path), CPU, clock)
    first_look = min(0.09 * count, 2.25)
    # A kind that is started is finished with one token at least; two looks, each half over at most.
    assert clock.now - 100 <= 2 * (1.5 * first_look + seconds + 6e-3)
    assert found and all(1 in timing.seconds for timing in found)
    if seconds < 1e-4:
        assert len(found) == count
    if seconds == 3e-3:
        assert all(256 not in timing.seconds for timing in found)


def entry(*seconds: object) -> dict[str, object]:
    kind = "cpu_blocks | int4 1x32 f16 | 64 x 32"
    return {"version": 4, "machines": {"here": {kind: dict(zip(("1", "32", "256"), seconds, strict=False))}}}


GARBAGE = [
    "",
    "{",
    "\x00\xff",
    "[1, 2]",
    "null",
    "[" * 100_000,
    json.dumps({"version": 1, "machines": entry([1, 1])["machines"]}),
    json.dumps({"version": 4, "machines": {"here": {"cpu_blocks | int4 1x32 f16 | 64 x 32": 5}}}),
    json.dumps(entry([1.0, 1.0, 0.0])),
    json.dumps(entry([1.0, 1.0, 1.0, 1.0])),
    json.dumps(entry([1.0, None])),
    json.dumps(entry([0.0, 1.0])),
    json.dumps(entry([1e-3, "1"])),
    json.dumps(entry([True, 1.0])),
    json.dumps(entry([1.0])),
    json.dumps(entry([float("nan"), 1.0])),
    json.dumps(entry([-1.0, 1.0])),
    json.dumps({"version": 4, "machines": {"here": {"cpu_blocks | int4 1x32 f16 | 64 x 32": {"2": [1, 1]}}}}),
]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_in_the_file_is_measured_over(text: str, clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "timings.json").write_text(text, encoding="latin-1")
    kept = table(tmp_path)
    kind = sample(clock.layer("x", lambda tokens, _: 1e-4))
    assert kept.find(kind) is None
    time_layers({kind: 1}, kept, CPU, clock)
    kept.save()
    assert table(tmp_path).find(kind) == kept.find(kind)


def test_sound_entries_beside_damaged_ones_are_kept(tmp_path: Path) -> None:
    document = entry([1e-3, 2e-3], [0, 1], [1e-2, 1e-2])
    document["machines"]["there"] = {"k": {"1": [1, 2]}, "broken": {"1": []}}  # type: ignore[index]
    (tmp_path / "timings.json").write_text(json.dumps(document))
    kept = table(tmp_path)
    assert kept.find(sample(never)) == {1: Seconds(1e-3, 2e-3), 256: Seconds(1e-2, 1e-2)}
    kept.add(sample(never, shape=(1, 1)), {1: Seconds(1.0, 1.0)})
    kept.save()
    written = json.loads((tmp_path / "timings.json").read_text())["machines"]
    assert written["there"] == {"k": {"1": [1.0, 2.0, None]}} and len(written["here"]) == 2


def test_two_servers_keep_each_others_kinds(tmp_path: Path) -> None:
    first, second = table(tmp_path), table(tmp_path)
    for number, kept in enumerate((first, second), 1):
        kept.add(sample(never, shape=(number, 1)), {1: Seconds(1.0, float(number), 3.0)})
        kept.save()
    read = table(tmp_path)
    assert all(read.find(sample(never, shape=(n, 1))) == {1: Seconds(1.0, float(n), 3.0)} for n in (1, 2))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = table(tmp_path)
    first.add(sample(never), {1: Seconds(1.0, 1.0)})
    first.save()
    before = (tmp_path / "timings.json").read_bytes()
    kept = table(tmp_path)
    kept.add(sample(never), {1: Seconds(2.0, 2.0)})

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        kept.save()
    assert [path.name for path in tmp_path.iterdir()] == ["timings.json"]
    assert (tmp_path / "timings.json").read_bytes() == before
    monkeypatch.undo()
    nothing = TimingTable(tmp_path / "never" / "timings.json", "here")
    nothing.save()
    assert not (tmp_path / "never").exists(), "nothing new, nothing written"


def test_old_machines_are_forgotten(tmp_path: Path) -> None:
    for number in range(20):
        kept = table(tmp_path, f"machine {number}")
        kept.add(sample(never), {1: Seconds(1.0, 1.0)})
        kept.save()
    names = list(json.loads((tmp_path / "timings.json").read_text())["machines"])
    assert names == [f"machine {number}" for number in range(4, 20)]


def test_slower_is_told_for_a_method_over_all_its_layers() -> None:
    def timed(seconds: dict[int, tuple[float, float]], count: int = 1, **how: object) -> Timing:
        return Timing(sample(never, **how), {n: Seconds(*pair) for n, pair in seconds.items()}, count)  # type: ignore[arg-type]

    one_slow = [timed({1: (2.0, 1.0)}), timed({1: (1.0, 2.0)}, 3, shape=(32, 32))]
    assert slower_than_bf16(one_slow) == [], "5 s against 7 s in all"
    mostly = [timed({1: (2.0, 1.0)}, 6), timed({1: (1.0, 2.0)}, 3, shape=(32, 32))]
    assert slower_than_bf16(mostly) == [Slower("cpu_blocks", "int4 1x32 f16", 1, pytest.approx(12 / 15))]
    # 640 rows of which 64 were timed weigh ten times as much as they took.
    tall = [timed({1: (1.1, 1.0)}, shape=(640, 32), rows=64), timed({1: (1.0, 4.0)}, shape=(32, 32))]
    assert slower_than_bf16(tall) == [] and slower_than_bf16(tall[:1]) == []
    tall[0] = timed({1: (1.5, 1.0)}, shape=(640, 32), rows=64)
    assert [found.ratio for found in slower_than_bf16(tall)] == [pytest.approx(14 / 16)]
    assert slower_than_bf16([timed({1: (1.09, 1.0)})]) == [], "as fast, within what can be measured"
    assert slower_than_bf16([timed({1: (9.0, 1.0)}, plain=True)]) == [], "f32 as stored is nobody's method"
    mixed = [
        timed({1: (1.0, 2.0), 32: (9.0, 1.0), 256: (2.0, 1.0)}),
        timed({1: (1.0, 2.0), 256: (2.0, 1.0)}, shape=(32, 32)),
        timed({1: (4.0, 1.0)}, kernel="reference", scheme="q2 odd"),
    ]
    assert [str(found) for found in slower_than_bf16(mixed)] == [
        "int4 1x32 f16 on cpu_blocks is slower than bf16: 0.5x with 256 tokens",
        "q2 odd on reference is slower than bf16: 0.25x with 1 token",
    ]


def test_slower_bf16_and_what_a_copy_would_do() -> None:
    """bf16 itself is only told of torch; a copy where all layers could have one and it is faster."""
    bf16 = Timing(sample(never, "bf16", kernel="cpu_dense", plain=True), {256: Seconds(2.0, 2.0, 1.0)})
    [found] = slower_than_bf16([bf16])
    assert found.plain and str(found) == "bf16 on cpu_dense is slower than torch's bf16: 0.5x with 256 tokens"
    slow = replace(sample(never), copies=True)
    assert [s.copy for s in slower_than_bf16([Timing(slow, {1: Seconds(2.0, 1.0)})])] == [pytest.approx(2.0)]
    assert [s.copy for s in slower_than_bf16([Timing(slow, {1: Seconds(2.0, 2.0, 1.0)})])] == [None], (
        "as slow"
    )
    mixed = [
        Timing(slow, {1: Seconds(2.0, 1.0)}),
        Timing(sample(never, shape=(1, 1)), {1: Seconds(2.0, 1.0)}),
    ]
    assert [s.copy for s in slower_than_bf16(mixed)] == [None]


def test_sample_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.native, "threads", lambda: 2)
    shapes = {(576, 576): 576, (49152, 576): 3584, (14336, 4096): 512, (100, 4096): 100, (151936, 10**5): 128}
    assert {shape: sample_rows(shape) for shape in shapes} == shapes
    monkeypatch.setattr(timing.native, "threads", lambda: 63)
    assert sample_rows((14336, 4096)) == 2048, "32 rows a thread, in blocks of 128"


def test_machine_names_what_times_depend_on() -> None:
    name = machine(CPU, "1.2.3")
    assert name.endswith(f"threads | torch {torch.__version__} | lowbit 1.2.3") and not name.startswith(" ")
    assert machine(CPU, "1", 63).split(" | ")[2] == "63 threads"


def test_real_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once without pretending: a bf16 layer against itself."""
    monkeypatch.setattr(timing, "_SWEEP_BYTES", 1 << 20)
    weight = torch.ones(16, 32)
    kind = sample(lambda x: x @ weight.T, shape=(16, 32))
    [found] = time_layers({kind: 1}, table(tmp_path), CPU)
    assert 1 in found.seconds and all(0 < s < 10 for entry in found.seconds.values() for s in entry if s)
    assert found.seconds[1].torch is not None
