"""How a rival's process is spoken to: one JSON document a line, in on stdin, out on what was stdout.

    python run_ENGINE.py '{"model": PATH, "threads": N, ...}'
    out: {"version", "details", "variants": [names]}                    once, when the model can answer
    in:  {"prompts": [[ids]], "max_tokens": n, "variant": name, "copied_contexts": bool}
    out: {"answers": [{"ids": [n tokens], "times": [n seconds since the line came]}]}, or {"error": text}
    in:  {"prompt": [ids], "logits": FILE, "variant": name}
    out: {"shape": [tokens, vocabulary]}: float32 in FILE, for each token what follows it; or {"error": text}

All prompts of a line run at once, greedily, to exactly n tokens. Nothing here imports anything but Python's
own modules: a rival's environment holds the rival and nothing of ours.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Pairs = list[tuple[list[int], list[float]]]  # the ids of each answer, and when they came
Complete = Callable[[list[list[int]], int, str, bool], Pairs]
Logits = Callable[[list[int], str], Any]  # a numpy array (tokens, vocabulary) of a prompt and a variant


def options() -> Any:
    """What the command line says."""
    return json.loads(sys.argv[1])


class Lines:
    """The two ends; whatever else the process prints goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, document: dict[str, Any]) -> None:
        self._out.write(json.dumps(document) + "\n")
        self._out.flush()

    def answer(
        self,
        version: str,
        details: dict[str, Any],
        variants: list[str],
        complete: Complete,
        logits: Logits | None = None,
    ) -> None:
        """Says ready, then answers until stdin ends. complete(prompts, max_tokens, variant, copied)."""
        self.say({"version": version, "details": details, "variants": variants})
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                if "logits" in asked:
                    if logits is None:
                        raise NotImplementedError("it gives tokens and no logits")
                    found = logits(asked["prompt"], asked["variant"]).astype("<f4", copy=False)
                    found.tofile(asked["logits"])
                    self.say({"shape": list(found.shape)})
                    continue
                pairs = complete(
                    asked["prompts"], asked["max_tokens"], asked["variant"], asked["copied_contexts"]
                )
                self.say({"answers": [{"ids": ids, "times": times} for ids, times in pairs]})
            except Exception as error:  # the other side decides what it means
                self.say({"error": f"{type(error).__name__}: {error}"})
