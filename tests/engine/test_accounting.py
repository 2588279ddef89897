"""The page accounting as a state machine: everything that can happen to an engine, in any order."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.stand_in import continuation
from engine.test_engine import make_engine, make_request, use_reference
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.scheduler import PATIENCE
from lowbit.errors import LowbitError


class Accounting(RuleBasedStateMachine):
    """Everything that can happen, in any order, on a pool of a few pages."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        use_reference(self.patch)
        self.engine: Engine | None = None
        self.open: dict[str, tuple[list[int], int]] = {}
        self.output: dict[str, list[int]] = {}
        self.quiet = 0

    def teardown(self) -> None:
        if self.engine is not None:
            for _ in range(3000):
                if not self.engine.has_work():
                    break
                self.advance()
            assert not self.open, "a request never ended"
            assert self.engine.check() == []
            status = self.engine.status()
            assert status.pages_free + status.pages_cached == status.pages_total
        self.patch.undo()

    @rule(
        pages=st.integers(1, 8),
        running=st.integers(1, 4),
        chunk=st.sampled_from((1, 5, 16, 100)),
        policy=st.sampled_from(("fcfs", "lpm")),
        overlap=st.booleans(),
    )
    def start(self, pages: int, running: int, chunk: int, policy: str, overlap: bool) -> None:
        if self.engine is None:
            self.engine = make_engine(
                ForcedModes(chunk=chunk, overlap=overlap),
                max_total_tokens=16 * pages,
                max_running_requests=running,
                schedule_policy=policy,
            )

    @rule(
        base=st.integers(0, 3),
        length=st.integers(1, 60),
        count=st.integers(1, 40),
        salt=st.sampled_from(("", "a")),
    )
    def submit(self, base: int, length: int, count: int, salt: str) -> None:
        assume(self.engine is not None)
        assert self.engine is not None
        prompt = [(base * 13 + i * i) % 60 + 4 for i in range(length)]
        request = make_request(prompt, count, cache_salt=salt, ignore_eos=True)
        try:
            self.engine.submit(request)
        except LowbitError as error:
            assert error.code == "prompt_too_long" and length + count > self.engine.context_length
            return
        assert length + count <= self.engine.context_length
        self.open[request.id] = (prompt, count)
        self.output[request.id] = []

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        assume(self.engine is not None)
        for _ in range(count):
            self.advance()

    def advance(self) -> None:
        assert self.engine is not None
        events = self.engine.step()
        waits = self.engine.status().waiting and not self.engine.status().running
        self.quiet = self.quiet + 1 if waits else 0
        assert self.quiet < 3, "something waits and nothing runs"
        for event in events:
            prompt, count = self.open[event.id]
            self.output[event.id] += event.tokens
            if event.finish_reason == "length":
                assert self.output[event.id] == continuation(prompt, count, stops=False)
            if event.finish_reason is not None:
                assert event.finish_reason in ("length", "abort")
                del self.open[event.id]

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        assume(self.engine is not None and self.open)
        assert self.engine is not None
        self.engine.cancel(data.draw(st.sampled_from(sorted(self.open))))

    @rule()
    def flush(self) -> None:
        assume(self.engine is not None)
        assert self.engine is not None
        self.engine.flush_cache()

    @rule()
    def retract(self) -> None:
        assume(self.engine is not None)
        assert self.engine is not None
        if self.engine._scheduler.running:
            self.engine._scheduler.retract(self.engine._scheduler.running[-1])

    @invariant()
    def books_are_right(self) -> None:
        if self.engine is not None:
            assert self.engine.check() == []
            assert all(sequence.passed <= PATIENCE for sequence in self.engine._scheduler.waiting)


TestAccounting = Accounting.TestCase
TestAccounting.settings = hypothesis_settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
