"""--lm-head-screen in the engine: answers are the whole head's, whatever is asked beside greedy ones."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from engine.stand_in import ByteTokenizer
from loading.test_online import make
from lowbit.checkpoint import open_checkpoint
from lowbit.commands.inspect import as_json, show
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.messages import Request, SamplingParams, TokenEvent
from lowbit.errors import LowbitError, thousands
from lowbit.kernels import native
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.loading import PackedCache, head_screen, load_model, packed_cache, plan_model
from lowbit.loading.head_screen import Weights, refuses
from lowbit.models.language_model import LanguageModel
from lowbit.models.model import Model
from lowbit.numerics.scheme import dense
from lowbit.settings import Settings
from models.test_families import make_checkpoint

pytestmark = pytest.mark.skipif(native.library() is None, reason="there are no screens without native code")
VOCABULARY = 1000


def load(folder: Path, wanted: str, **options: object) -> Model:
    return load_model(open_checkpoint(str(folder)), device="cpu", lm_head_screen=wanted, **options)  # type: ignore[arg-type]


def steps_of(model: Model) -> tuple[int, int, int]:
    assert isinstance(model, LanguageModel)
    return (0, 0, 0) if model.screened is None else model.screened.steps


def answers(
    model: Model, requests: list[SamplingParams], **settings: object
) -> dict[str, tuple[object, ...]]:
    """Everything that each request was told; a new one comes every third step."""
    values: dict[str, object] = {"device": "cpu", "max_total_tokens": 2048, **settings}
    engine = Engine(model, ByteTokenizer(), Settings(**values), forced=ForcedModes(check=True))  # type: ignore[arg-type]
    told: dict[str, list[TokenEvent]] = {}
    waiting = [
        Request(id=str(number), prompt=tuple(range(3 + number, 9 + 2 * number)), sampling=sampling)
        for number, sampling in enumerate(requests)
    ]
    turn = 0
    while waiting or engine.has_work():
        if waiting and turn % 3 == 0:
            engine.submit(waiting.pop(0))
        for event in engine.step():
            told.setdefault(event.id, []).append(event)
        turn += 1
    return {
        name: (
            [token for event in events for token in event.tokens],
            [rated for event in events for rated in event.logprobs],
            events[-1].error,
            events[-1].finish_reason,
        )
        for name, events in told.items()
    }


def greedy(**more: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, **more})  # type: ignore[arg-type]


MIXED = [
    *(greedy(), greedy(max_tokens=4), greedy(logprobs=2, max_tokens=6), greedy(), greedy(prompt_logprobs=1)),
    *(greedy(logit_bias={7: 5.0}, max_tokens=5), greedy(repetition_penalty=1.3, max_tokens=5), greedy()),
    *(greedy(temperature=1.0, seed=3, max_tokens=8), greedy(min_tokens=3, ignore_eos=False), greedy()),
]


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_mixed_batch(tied: bool, capture: bool, tmp_path: Path) -> None:
    make(tmp_path, vocab_size=VOCABULARY, tie_word_embeddings=tied)
    with_screen = load(tmp_path, "on")
    found = answers(with_screen, MIXED, disable_cuda_graph=not capture)
    assert found == answers(load(tmp_path, "off"), MIXED, disable_cuda_graph=not capture)
    screened, blocks, whole = steps_of(with_screen)
    assert screened > 20 and whole < 5 and blocks < 0.3 * screened * VOCABULARY / 16


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Cohere2"])
def test_caps_and_scales_of_logits(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    if family == "Gemma2":
        path.write_text(json.dumps(config | {"final_logit_softcapping": 0.01}))  # where many become equal
    requests = [greedy() for _ in range(4)]
    models = [load(tmp_path, wanted) for wanted in ("on", "off")]
    assert answers(models[0], requests) == answers(models[1], requests)
    assert sum(steps_of(models[0])) and not sum(steps_of(models[1]))


def test_drafts_are_verified(tmp_path: Path) -> None:
    make(tmp_path, vocab_size=VOCABULARY)
    models, requests = [load(tmp_path, wanted) for wanted in ("on", "off")], [greedy(max_tokens=60)] * 2
    expected = answers(models[1], requests)
    assert answers(models[0], requests, speculative_algorithm="NGRAM") == expected
    assert steps_of(models[0])[0] > 10


def test_nan_is_found_and_said_alike(tmp_path: Path) -> None:
    """Token 5 has no number in it: its request alone ends, with as many broken logits as ever."""
    make(tmp_path, vocab_size=VOCABULARY)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][5] = np.nan
    save_file(weights, file, metadata={"format": "pt"})
    models = [load(tmp_path, wanted) for wanted in ("on", "off")]
    requests = [greedy(), greedy(), greedy()]  # the first two have token 5 in their prompts
    found = answers(models[0], requests)
    assert found == answers(models[1], requests)
    assert f"{VOCABULARY} of {VOCABULARY} logits are NaN" in str(found["0"][2])
    assert found["2"][3] == "error" or len(found["2"][0]) == 20  # type: ignore[arg-type]


def test_only_what_was_asked_for_is_left_out(tmp_path: Path) -> None:
    """A forward that says nothing of greedy gives all logits."""
    from forward_helpers import allocate, chunk_batch

    make(tmp_path, vocab_size=VOCABULARY)
    model = load(tmp_path, "on")
    logits: list[Tensor] = []
    for wanted in (False, True):
        batch: ForwardBatch = replace(chunk_batch([([5, 6, 7], 0, [0])]), greedy=wanted)
        logits.append(model.forward(batch, allocate(model, 1)))
    assert not torch.isinf(logits[0]).any() and torch.isneginf(logits[1]).any()
    assert torch.equal(logits[0].argmax(1), logits[1].argmax(1))


def test_auto_asks_for_a_share_and_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, vocab_size=VOCABULARY)
    assert load(tmp_path, "auto").screened is None  # type: ignore[attr-defined]
    monkeypatch.setattr(head_screen, "LEAST_BYTES", 0)
    assert load(tmp_path, "auto").screened is not None  # type: ignore[attr-defined]
    config = load(tmp_path, "off").config
    options = (dense("bf16"), "cpu_dense")
    cpu = torch.device("cpu")

    def reason(wanted: str, head: int, total: int, ranks: int = 1) -> str | None:
        weights = Weights(head, embedding=head, experts=0, all=total)
        return refuses(wanted, config, *options, weights, cpu, ranks)

    assert reason("auto", 100, 1100) is None
    assert reason("auto", 100, 1200) == "the head is 9.1% of what a step reads, 10% are needed"
    assert reason("on", 100, 10**6) is None
    assert reason("off", 100, 1000) == "--lm-head-screen off"
    assert reason("auto", 100, 1000, ranks=2) == "ranks share the head"
    monkeypatch.undo()
    assert reason("auto", 1000, 10000) == f"the head has {thousands(1000)} bytes, which caches may hold"


def test_a_head_that_can_have_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, vocab_size=VOCABULARY)
    with pytest.raises(
        LowbitError, match="--lm-head-screen on: the head runs on reference; use auto"
    ) as error:
        load(tmp_path, "on", linear_kernel="reference")
    assert error.value.code == "E0415"
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][5, 6] = np.inf
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(LowbitError, match="its weights are not all finite"):
        load(tmp_path, "on")


def test_inspect_says_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, vocab_size=VOCABULARY)
    header = open_checkpoint(str(tmp_path))
    plain, screened = (plan_model(header, device="cpu", lm_head_screen=wanted) for wanted in ("off", "on"))
    model = load(tmp_path, "on")
    assert isinstance(model, LanguageModel) and model.screened is not None
    bytes_there = model.screened.screen.nbytes
    assert screened.weight_bytes - plain.weight_bytes == screened.screen_bytes
    assert abs(bytes_there - screened.screen_bytes) <= 256  # the table of codes
    assert model.weight_bytes - load(tmp_path, "off").weight_bytes == bytes_there
    settings = Settings(model="m", lm_head_screen="on")
    assert as_json(settings, screened, 10)["lm_head_screen_bytes"] == screened.screen_bytes
    show(settings, screened, 10)
    assert "screen of the output head, for greedy tokens: " in capsys.readouterr().out
    auto = plan_model(header, device="cpu", lm_head_screen="auto")
    show(Settings(model="m"), auto, 10)
    said = " ".join(capsys.readouterr().out.split())
    assert "no screen of the output head: the head has 512 000 bytes, which caches may hold" in said


def test_it_is_kept_with_the_packed_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_cache, "_SETTLED_SECONDS", -5.0)
    make(tmp_path / "m", vocab_size=VOCABULARY)
    cache = PackedCache(tmp_path / "kept", 1 << 30)
    fresh = load(tmp_path / "m", "on", packed_cache=cache)
    monkeypatch.setattr(head_screen.screened_head, "make_screen", lambda head: pytest.fail("made again"))
    with caplog.at_level(logging.INFO, "lowbit"):
        mapped = load(tmp_path / "m", "on", packed_cache=cache)
    assert mapped.mapped_bytes == mapped.weight_bytes == fresh.weight_bytes
    assert isinstance(mapped, LanguageModel) and mapped.screened is not None
    assert "greedy tokens come from a screened output head" in caplog.text
    assert answers(mapped, [greedy()]) == answers(fresh, [greedy()])
    assert load(tmp_path / "m", "off", packed_cache=cache).weight_bytes < fresh.weight_bytes
