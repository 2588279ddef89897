"""Speculation changes how many steps an answer takes and nothing else: every event's content is compared with
the same engine's without it, on a stand-in that copies itself often and on the embedded model."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.stand_in import ByteTokenizer, StandIn, next_copied
from engine.test_step_capture import SCHEMES, quantize_inputs, tiny_llama
from lowbit.checkpoint import open_checkpoint
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.messages import Request, SamplingParams, TokenEvent, TokenLogprob
from lowbit.engine.scheduler import Chunk
from lowbit.engine.speculation import STEP_TOKENS, Drafter, Speculation, worth
from lowbit.errors import LowbitError
from lowbit.kernels import attention, native
from lowbit.kernels.activation_state import ActivationStates
from lowbit.kernels.attention_reference import ReferenceAttention
from lowbit.loading import load_model
from lowbit.models.model import Model
from lowbit.quantize.recipe import Asked
from lowbit.settings import Settings
from lowbit.tokenization import load_tokenizer
from lowbit.tokenization.tokenizer import Tokenizer
from models import test_deepseek, test_families

NGRAM = {"speculative_algorithm": "NGRAM", "speculative_ngram_min_match_window_size": 1}

# ---- what is drafted -------------------------------------------------------------------------------------


def found(tokens: list[int], shortest: int, longest: int) -> int:
    """The place after the longest earlier occurrence of the end of ``tokens``, the latest of equals; or 0."""
    best = (0, 0)
    for place in range(1, len(tokens)):
        matched = 0
        while matched < min(longest, place) and tokens[place - 1 - matched] == tokens[-1 - matched]:
            matched += 1
        if matched >= shortest:
            best = max(best, (matched, place))
    return best[1]


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=15),
    st.lists(st.integers(0, 2), min_size=1, max_size=15),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_drafts_follow_the_longest_match_while_it_is_right(
    prompt: list[int], answer: list[int], shortest: int, more: int
) -> None:
    """Against a search through the whole text, after every token; a run that goes on right is followed."""
    tokens = list(prompt)
    drafter = Drafter(tokens, Speculation(5, shortest, shortest + more))
    source, trust = 0, 0.5
    for token in [*answer, -1]:
        if not source:
            source = found(tokens, shortest, shortest + more)
        expected = list(tokens)
        for place in range(5 if source else 0):
            expected.append(expected[source + place])
        drafted = drafter.draft(5, 1e-9)
        assert list(drafted) == expected[len(tokens) :][: len(drafted)]
        assert drafter.trust == pytest.approx(trust)
        assert len(drafted) == (5 if source and trust**5 >= 1e-9 else 0)
        if source:
            right = tokens[source] == token
            trust += (right - trust) / 4
            source = source + 1 if right else 0
        tokens.append(token)


def test_the_latest_of_many_occurrences_is_enough() -> None:
    tokens = [1, 2, 3, 9] + [5, 1, 2, 7] * 40 + [3, 1, 2]
    assert Drafter(tokens, Speculation(4, 2, 8)).draft(1, 0.4) == (7,), "its neighbour matches one token more"


def test_drafts_grow_while_they_are_right_and_stop_while_they_are_wrong() -> None:
    text = [(7 * place * place) % 101 for place in range(60)]
    tokens = [*text, 200, *text[:2]]
    drafter = Drafter(tokens, Speculation(12, 2, 8))
    lengths = []
    for token in text[2:40]:
        lengths.append(len(drafter.draft(12, worth(1))))
        tokens.append(token)
    assert lengths[0] == 1 and lengths == sorted(lengths) and lengths[-1] == 12
    lengths = []
    for place in range(40):  # every pair has stood there, and something else followed
        lengths.append(len(drafter.draft(12, worth(1))))
        tokens.append(text[place + 1] if place % 2 else text[(place + 7) % 60])
    assert sum(lengths[:20]) <= 20 and sum(lengths[30:]) == 0
    longest_run = [*text[:1] * 400]
    drafter = Drafter(longest_run, Speculation(12, 2, 8))
    for _ in range(400):
        drafter.draft(12, 0.3)
        longest_run.append(text[0])
    assert len(drafter.draft(12, 0.3)) == 12, "trust that has become 1 is no logarithm of zero"


def test_many_sequences_want_surer_drafts() -> None:
    assert [round(worth(count), 2) for count in (1, 2, 8, 16)] == [0.3, 0.46, 0.77, 0.87]


# ---- options ---------------------------------------------------------------------------------------------


def test_what_the_options_mean() -> None:
    assert Speculation.by(Settings()) is None
    assert Speculation.by(Settings(speculative_algorithm="NGRAM")) == Speculation(12, 2, 12)
    config = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}'
    assert Speculation.by(Settings(speculative_config=config)) == Speculation(5, 2, 4)
    for key, window in (("max", (1, 1)), ("min", (20, 20))):
        config = f'{{"method": "ngram", "prompt_lookup_{key}": {window[0]}}}'
        assert Speculation.by(Settings(speculative_config=config)) == Speculation(12, *window)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {
                "speculative_algorithm": "NGRAM",
                "speculative_ngram_min_match_window_size": 9,
                "speculative_ngram_max_match_window_size": 8,
            },
            "--speculative-ngram-min-match-window-size 9 is over --speculative-ngram-max-match-window-size 8",
        ),
        (
            {"speculative_algorithm": "NGRAM", "speculative_config": "{}"},
            "--speculative-config and --speculative-algorithm say the same thing",
        ),
        ({"speculative_config": "{"}, "--speculative-config is not JSON"),
        ({"speculative_config": "[]"}, "must be a JSON object, got []"),
        ({"speculative_config": "{}"}, "method null: drafts come from the sequence's own text only"),
        ({"speculative_config": '{"method": "eagle"}'}, 'method "eagle": drafts come from'),
        (
            {"speculative_config": '{"method": "ngram", "prompt_lookup_mix": 2}'},
            "unknown key 'prompt_lookup_mix'; did you mean 'prompt_lookup_min'?",
        ),
        (
            {"speculative_config": '{"method": "ngram", "num_speculative_tokens": 65}'},
            "num_speculative_tokens must be a whole number between 1 and 64, got 65",
        ),
        (
            {"speculative_config": '{"method": "ngram", "prompt_lookup_min": 3, "prompt_lookup_max": 2}'},
            "prompt_lookup_min 3 is over prompt_lookup_max 2",
        ),
    ],
)
def test_what_is_wrong_with_the_options_is_said(options: dict[str, object], said: str) -> None:
    with pytest.raises(LowbitError) as raised:
        Speculation.by(Settings(**options))
    assert said in raised.value.message


# ---- the engine ------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """All that a request's events said, however many there were."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: object = None
    end: tuple[object, ...] = ()

    def take(self, event: TokenEvent) -> None:
        self.tokens += event.tokens
        self.text += event.text
        self.logprobs += event.logprobs
        self.prompt_logprobs = self.prompt_logprobs or event.prompt_logprobs
        if event.finish_reason is not None:
            error = (event.error_code, event.error.partition(" near ")[0])
            counts = (event.prompt_tokens, event.completion_tokens)
            self.end = (event.finish_reason, event.matched_stop, error, counts)


class Watched:
    """An engine whose steps are looked at."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.answers: dict[str, Answer] = {}
        self.drafted: list[tuple[int, int]] = []  # of each step with drafts: decoding sequences, all tokens
        self.drafts: set[tuple[int, ...]] = set()
        self.usage = [0, 0]
        self._forward = engine._runner.forward
        engine._runner.forward = self._watch  # type: ignore[method-assign]

    def _watch(
        self, chunks: list[Chunk], rows: list[int], chosen: Tensor | None, *, greedy: bool = False
    ) -> object:
        decoding = [chunk for chunk in chunks if chunk.sequence.output_length]
        self.drafts |= {chunk.drafts for chunk in chunks}
        for chunk in chunks:
            end = chunk.sequence.computed + len(chunk.tokens)
            assert not chunk.drafts or end < chunk.sequence.limit, "nothing is chosen behind the limit"
        if any(chunk.drafts for chunk in chunks):
            self.drafted.append((len(decoding), sum(len(chunk.tokens) for chunk in decoding)))
        return self._forward(chunks, rows, chosen, greedy=greedy)

    def step(self) -> None:
        engine = self.engine
        for event in engine.step():
            self.answers.setdefault(event.id, Answer()).take(event)
            self.usage[0] += event.accepted_drafts
            self.usage[1] += event.rejected_drafts
        assert engine.check() == []
        for sequence in engine._scheduler.running:
            pages = -(-sequence.computed // engine.settings.page_size)
            if sequence.output_length and not engine.status().preemptions:
                assert sequence.pending == 1, "what was right is not computed again"
            assert len(sequence.pages) == pages, "pages of wrong drafts are given back"

    def run(self, requests: list[Request], seed: int = 0) -> dict[str, Answer]:
        """Requests at random times."""
        draw, waiting = random.Random(seed), list(reversed(requests))
        while waiting or self.engine.has_work():
            while waiting and draw.random() < 0.4:
                self.engine.submit(waiting.pop())
            self.step()
        return self.answers


def stand_in_engine(on: bool, model: StandIn | None = None, **options: object) -> Watched:
    forced = options.pop("forced", ForcedModes())
    values = {"device": "cpu", "max_total_tokens": 640, "max_running_requests": 8, **options}
    settings = Settings(**values, **(NGRAM if on else {}))
    return Watched(Engine(model or StandIn(next_copied), ByteTokenizer(), settings, forced=forced))


@pytest.fixture
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in reads the reference kernel's plain pages."""
    monkeypatch.setattr(attention, "attention_kernels", lambda: [ReferenceAttention()])


def mixed_requests(count: int, seed: int, longest: int = 60) -> list[Request]:
    """Prompts with repeats and common beginnings, and every way of choosing and ending."""
    draw = random.Random(seed)
    shared = [draw.randrange(4, 20) for _ in range(40)]
    requests = []
    for index in range(count):
        prompt = shared[: draw.choice((0, 20, 40))]
        prompt += [draw.randrange(4, 20) for _ in range(draw.randint(1, max(2, longest - len(prompt))))]
        options: dict[str, object] = {
            "temperature": draw.choice((0.0, 0.0, 0.7, 1.3)),
            "seed": index,
            "max_tokens": draw.choice((1, 2, 17, 40, 60)),
            "ignore_eos": draw.random() < 0.7,
        }
        options |= draw.choice(
            (
                {},
                {"repetition_penalty": 1.4, "presence_penalty": 0.4},
                {"frequency_penalty": 0.9, "logit_bias": {7: 3.0, 9: -50.0}},
                {"logprobs": 2, "top_p": 0.9},
                {"prompt_logprobs": 1, "top_k": 5},
                {"stop": ("<", "5;"), "min_p": 0.05},
                {"stop": ("77",), "include_stop_str_in_output": True},
                {"stop_token_ids": (11,), "min_tokens": 9, "logprobs": 0},
            )
        )
        echo = draw.random() < 0.05
        if echo:
            options |= {"max_tokens": None, "prompt_logprobs": 1}
        salt = draw.choice(("", "a"))
        sampling = SamplingParams(**options)
        requests.append(
            Request(id=str(index), prompt=tuple(prompt), sampling=sampling, cache_salt=salt, echo_only=echo)
        )
    return requests


MODES = {
    "plain": {},
    "one at a time": {"max_running_requests": 1},
    "tiny chunks": {"forced": ForcedModes(chunk=3)},
    "retraction": {"forced": ForcedModes(retract_every=3, chunk=11)},
    "retraction and eviction": {"forced": ForcedModes(retract_every=2, evict_always=True)},
    "a small pool": {"max_total_tokens": 160},
    "no prefix cache": {"disable_radix_cache": True},
    "long drafts": {"speculative_num_draft_tokens": 40},
}


@pytest.mark.usefixtures("plain_attention")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_answers_are_the_same(mode: str, seed: int) -> None:
    requests = mixed_requests(24, seed)
    without = stand_in_engine(False, **MODES[mode])
    expected = without.run(requests, seed)
    speculating = stand_in_engine(True, **MODES[mode])
    answers = speculating.run(requests, seed)
    assert answers == expected and len(answers) == 24
    status, plain = speculating.engine.status(), without.engine.status()
    assert status.generated_tokens == plain.generated_tokens
    assert 0 < status.accepted_draft_tokens < status.draft_tokens
    assert speculating.usage == [
        status.accepted_draft_tokens,
        status.draft_tokens - status.accepted_draft_tokens,
    ]
    assert status.steps < plain.steps or "tiny chunks" in mode
    if "retraction" in mode or "pool" in mode:
        assert status.preemptions > 0
    if mode in ("plain", "a small pool"):
        assert status.cached_prompt_tokens > 0
    # What the prefix tree kept is right: answers go on from it, and read it.
    follow = [
        Request(
            id=f"after {request.id}",
            prompt=(*request.prompt, *answers[request.id].tokens),
            sampling=SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True),
            cache_salt=request.cache_salt,
        )
        for request in requests
    ]
    speculating.run(follow)
    for request in follow:
        tokens = list(request.prompt)
        for token in answers[request.id].tokens:
            assert token == next_copied(tokens)
            tokens.append(token)


@pytest.mark.usefixtures("plain_attention")
def test_a_step_has_few_drafts_and_none_beside_many_sequences() -> None:
    loop = Request(id="x", prompt=(4, 5, 6) * 9, sampling=SamplingParams(temperature=0.0, max_tokens=90))

    def follow(context: list[int]) -> int:
        return context[-3]

    def steps(count: int, **options: object) -> Watched:
        engine = stand_in_engine(True, StandIn(follow), max_total_tokens=4096, **options)
        names = [Request(id=str(n), prompt=loop.prompt, sampling=loop.sampling) for n in range(count)]
        for request in names:
            engine.engine.submit(request)
        while engine.engine.has_work():
            engine.step()
        assert all(answer.tokens == [4, 5, 6] * 30 for answer in engine.answers.values())
        return engine

    alone = steps(1, speculative_num_draft_tokens=5)
    assert max(tokens for _, tokens in alone.drafted) == 6
    assert alone.engine.status().steps < 30
    assert max(tokens for _, tokens in steps(1, speculative_num_draft_tokens=64).drafted) > 60
    few = steps(4, max_running_requests=32).drafted
    assert max(few) == (4, STEP_TOKENS) and all(tokens <= STEP_TOKENS for _, tokens in few)
    assert not steps(STEP_TOKENS, max_running_requests=32).drafted


@pytest.mark.usefixtures("plain_attention")
def test_drafts_take_free_pages_only() -> None:
    engine = stand_in_engine(False, max_total_tokens=64)
    engine.engine.submit(Request(id="x", prompt=(4,) * 47, sampling=SamplingParams(temperature=0.0)))
    engine.step()
    scheduler = engine.engine._scheduler
    [sequence] = scheduler.running
    chunk = Chunk(sequence, 1)
    assert scheduler.room_for_drafts(chunk, 40) == 16 and len(sequence.pages) == 4
    scheduler.drop_drafts(sequence)
    assert len(sequence.pages) == 3 and scheduler.pool.free == 1
    assert scheduler.check() == []
    scheduler.pool.take(1)
    assert scheduler.room_for_drafts(chunk, 40) == 0 and len(sequence.pages) == 3
    assert scheduler.preemptions == 0


@pytest.mark.usefixtures("plain_attention")
@pytest.mark.parametrize("said", [30, 9])
def test_only_a_token_that_was_chosen_can_break_a_request(said: int) -> None:
    """Token 9 makes NaN of the logits behind it: as a wrong draft it does nothing, said it is the end."""
    run = list(range(10, 30))
    prompt = (*run, 9, 40, 41, 42, 43, 44, 45, *run[:3])

    def says(context: list[int]) -> int:
        return said if context[-1] == 29 else context[-1] + 1

    answers = []
    for on in (False, True):
        model = StandIn(says)
        model.poisoned = {9}
        engine = stand_in_engine(on, model)
        sampling = SamplingParams(temperature=0.0, max_tokens=30, logprobs=1)
        engine.engine.submit(Request(id="x", prompt=prompt, sampling=sampling))
        while engine.engine.has_work():
            engine.step()
        answers.append(engine.answers["x"])
    assert answers[0] == answers[1] and any(9 in drafts for drafts in engine.drafts)
    assert answers[0].tokens[:18] == [*run[3:], said]
    assert answers[0].end[0] == ("error" if said == 9 else "length")
    assert engine.engine.status().draft_tokens > engine.engine.status().accepted_draft_tokens


class Spanning(StandIn):
    """Says that its inputs share scales."""

    spans_tokens = True


@pytest.mark.usefixtures("plain_attention")
def test_models_whose_answers_would_change_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    stand_in_engine(False, Spanning())
    with pytest.raises(LowbitError, match="this model's inputs share scales between tokens"):
        stand_in_engine(True, Spanning())
    model = StandIn()
    model.kernels = frozenset({"reference"})  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        stand_in_engine(True, model)
    assert "some layers run on the reference kernel" in caplog.text


@pytest.mark.usefixtures("plain_attention")
def test_the_log_says_at_the_end_what_it_brought(caplog: pytest.LogCaptureFixture) -> None:
    model = StandIn(lambda context: context[-3])
    model.states = ActivationStates()  # type: ignore[attr-defined]
    engine = stand_in_engine(True, model)
    sampling = SamplingParams(temperature=0.0, max_tokens=50)
    engine.run([Request(id="x", prompt=(4, 5, 6, 4), sampling=sampling)])
    with caplog.at_level(logging.INFO):
        engine.engine.close()
    said = re.search(r"speculation: (\d+) of (\d+) drafts were right, (.*) tokens a step", caplog.text)
    assert said is not None and float(said[3]) > 4
    assert 30 < int(said[1]) <= int(said[2]) == engine.engine.status().draft_tokens


# ---- real models -----------------------------------------------------------------------------------------

COPIED = """The page pool knows who holds which page. A page nobody holds is free; one that only the
tree holds is idle, and may be evicted."""
PROMPTS = [
    f"Repeat this text exactly, word for word:\n\n{COPIED}",
    f"Write evict instead of take in this text, and repeat it:\n\n{COPIED}",
    "Write a short story about a lighthouse.",
]


@pytest.fixture
def as_the_engine_runs() -> Iterator[None]:
    """torch alone, as beside native kernels; without them its last bits depend on the batch."""
    if native.library() is None:
        pytest.skip("no native library")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_requests(tokenizer: Tokenizer) -> list[Request]:
    """Greedy and sampled answers, most to prompts that ask for copies, some of them begun."""
    requests = []
    for index in range(6):
        text = f"<|im_start|>user\n{PROMPTS[index % 3]}<|im_end|>\n<|im_start|>assistant\n"
        if index % 3 < 2:
            text += COPIED[: 12 * index]
        sampling = SamplingParams(
            temperature=(0.0, 0.4)[index % 2],
            seed=index,
            max_tokens=30,
            logprobs=1,
            repetition_penalty=1.05 if index == 4 else 1.0,
        )
        prompt = tuple(tokenizer.encode(text))
        requests.append(Request(id=str(index), prompt=prompt, sampling=sampling))
    return requests


def check_model(
    model: Model, tokenizer: Tokenizer, requests: list[Request], runs: list[dict[str, object]]
) -> list[Watched]:
    """The requests without speculation, then with it in each of the ways: equal tokens and log-probabilities.

    Log-probabilities are float64 of float32 logits: one bit of a logit would show.
    """
    watched = []
    for number, options in enumerate([{}, *runs]):
        forced = options.pop("forced", ForcedModes())
        values = {"device": "cpu", "max_total_tokens": 4096, **options}
        settings = Settings(**values, **(NGRAM if number else {}))
        watched.append(Watched(Engine(model, tokenizer, settings, forced=forced)))
        watched[-1].run(requests, number)
        assert watched[-1].answers == watched[0].answers, options
        status = watched[-1].engine.status()
        assert (status.accepted_draft_tokens > 0) == bool(number)
    return watched


@pytest.mark.usefixtures("as_the_engine_runs")
@pytest.mark.parametrize("cache_type", ["auto", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_embedded_model_says_the_same(cache_type: str) -> None:
    model = load_model(open_checkpoint("smollm2"), device="cpu", kv_cache_dtype=cache_type)
    tokenizer = load_tokenizer(open_checkpoint("smollm2"))
    forced = ForcedModes(retract_every=9, chunk=61)
    together = {"max_running_requests": 6, "max_total_tokens": 640, "forced": forced}
    runs: list[dict[str, object]] = [{"max_running_requests": 1}, together]
    alone = check_model(model, tokenizer, model_requests(tokenizer), runs)[1].engine.status()
    assert alone.accepted_draft_tokens > 20 and alone.steps < 6 * 30 - 20
    assert alone.captured_steps > 0.7 * alone.steps, "steps with drafts are replayed too"


@pytest.mark.usefixtures("as_the_engine_runs")
@pytest.mark.parametrize("scheme", ["int8 per token", "fp8 in groups"])
def test_quantized_inputs(scheme: str, tmp_path: Path) -> None:
    model = quantize_inputs(tiny_llama(tmp_path), SCHEMES[scheme])
    draw = random.Random(5)
    requests = []
    for index in range(16):
        prompt = tuple(draw.randrange(4, 9) for _ in range(30))
        sampling = SamplingParams(temperature=0.7 * (index % 2), seed=index, max_tokens=40, logprobs=3)
        requests.append(Request(id=str(index), prompt=prompt, sampling=sampling))
    check_model(model, ByteTokenizer(), requests, [{"max_total_tokens": 512}, {"max_running_requests": 2}])


@pytest.mark.usefixtures("as_the_engine_runs")
@pytest.mark.parametrize("family", ["Mixtral", "Gemma3", "GptOss", "DeepSeek"])
def test_windows_mixtures_and_latents(family: str, tmp_path: Path) -> None:
    """Of random weights; some answers are kept to two tokens, so that they repeat themselves."""
    if family == "DeepSeek":
        test_deepseek.make_checkpoint("DeepseekV3 native, biases", tmp_path)
    else:
        test_families.make_checkpoint(family, tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu")
    draw = random.Random(6)
    requests = []
    for index in range(8):
        prompt = tuple(draw.randrange(4, 9) for _ in range(12 * index + 1))
        sampling = SamplingParams(
            temperature=0.3 * (index % 2),
            seed=index,
            max_tokens=60,
            logprobs=3,
            ignore_eos=True,
            logit_bias={4: 30.0, 5: 30.0} if index % 3 == 0 else {},
        )
        requests.append(Request(id=str(index), prompt=prompt, sampling=sampling))
    check_model(model, ByteTokenizer(), requests, [{"max_total_tokens": 512}, {"max_running_requests": 2}])


def test_which_input_scales_span_tokens() -> None:
    expected = {"fp8 per tensor", "delayed", "llm.int8"}
    assert {name for name, scheme in SCHEMES.items() if scheme and scheme.depends_on_batch} == expected
    fixtures = Path(__file__).parents[1] / "fixtures" / "compressed_tensors"
    for name, spans in (("w8a8_dynamic", False), ("nvfp4", False)):
        model = load_model(open_checkpoint(str(fixtures / name)), device="cpu")
        assert model.spans_tokens is spans


@pytest.mark.parametrize("name", ["fp8dq-per_tensor", "fp8dq-per_row"])
def test_a_model_quantized_at_load_says_so(name: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    asked = Asked(torchao_config=name)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu", quantization=asked)
    assert model.spans_tokens is (name == "fp8dq-per_tensor")
