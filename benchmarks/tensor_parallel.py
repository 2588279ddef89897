"""What does sharing a model between ranks change? Its greedy tokens, one process beside several.

    python benchmarks/tensor_parallel.py                          # the embedded model on two ranks
    python benchmarks/tensor_parallel.py --model DIR --tp-size 4 --tokens 256

Sums over ranks have another order than in one process, which is about 1e-7 of them; kernels then round
inputs to bfloat16, and such a last bit now and then tips a rounding. How often that becomes another token
is counted at every position of answers that one process gave: both read the same text, and each names the
token it holds likeliest. *Flips* are positions where the two differ, with the gap between first and second
there; *diverged* are the answers that differ when each goes on by itself. Answers of two runs on the ranks
must be equal. Tokens a second are of the answers, all at once. Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

from lowbit.engine.messages import SamplingParams, TokenLogprob
from lowbit.llm import LLM, Completion

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain how rainbows form and why the sky is blue.",
    "Write a letter to a friend about moving to a new city.",
    "List ten uses of a paper clip.",
    "How does a bicycle stay upright?",
    "Write a Python function that merges two sorted lists.",
    "Translate into French: The boat leaves before dawn.",
)


@dataclass(frozen=True)
class Answers:
    """``tokens``: of each prompt's answer; ``likeliest``: at each of their positions, read as a text."""

    tokens: list[list[int]]
    likeliest: list[list[TokenLogprob]]
    rate: float  # tokens a second of wall time


def answers(llm: LLM, prompts: list[list[int]], count: int, texts: list[list[int]] | None) -> Answers:
    """Greedy answers, and what the model makes of ``texts``, answers to the same prompts; None: its own."""
    greedy = SamplingParams(temperature=0.0, max_tokens=count)
    began = time.perf_counter()
    given = llm.generate(prompts, greedy)
    rate = sum(len(one.tokens) for one in given) / (time.perf_counter() - began)
    if [one.tokens for one in llm.generate(prompts, greedy)] != [one.tokens for one in given]:
        raise SystemExit("two runs gave different answers")
    tokens = [one.tokens for one in given]
    read = llm.generate(
        [[*prompt, *text] for prompt, text in zip(prompts, texts or tokens, strict=True)],
        SamplingParams(max_tokens=0, prompt_logprobs=2),
    )
    return Answers(tokens, [_behind(one, prompt) for one, prompt in zip(read, prompts, strict=True)], rate)


def _behind(read: Completion, prompt: list[int]) -> list[TokenLogprob]:
    """What was thought of each token behind the prompt."""
    assert read.prompt_logprobs is not None, "they were asked for"
    return [entry for entry in read.prompt_logprobs[len(prompt) :] if entry is not None]


def compared(alone: Answers, shared: Answers) -> dict[str, object]:
    """Flips, gaps and answers that went apart."""
    pairs = [
        pair
        for mine, theirs in zip(alone.likeliest, shared.likeliest, strict=True)
        for pair in zip(mine, theirs, strict=True)
    ]
    flips = [one for one, other in pairs if one.top[0][0] != other.top[0][0]]
    gaps = sorted(one.top[0][1] - one.top[1][1] for one in flips)
    differences = [abs(one.logprob - other.logprob) for one, other in pairs]
    diverged = [a != b for a, b in zip(alone.tokens, shared.tokens, strict=True)]
    return {
        "positions": len(pairs),
        "flips": len(flips),
        "flip_rate": len(flips) / len(pairs),
        "largest_gap_of_a_flip": gaps[-1] if gaps else 0.0,
        "mean_logprob_difference": sum(differences) / len(differences),
        "largest_logprob_difference": max(differences),
        "answers": len(diverged),
        "diverged": sum(diverged),
        "tokens_a_second": {"one process": round(alone.rate, 1), "ranks": round(shared.rate, 1)},
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--linear-kernel", default="auto", help="as lowbit's; reference: nothing is rounded")
    options = parser.parse_args()
    common = {
        "max_total_tokens": 4 * len(QUESTIONS) * (options.tokens + 64),
        "linear_kernel": options.linear_kernel,
        "kernel_timings": "off",
    }
    with LLM(options.model, **common) as llm:
        if llm.chat_template is None:
            prompts = [llm.tokenizer.encode(question) for question in QUESTIONS]
        else:
            prompts = [llm.chat_template.render([{"role": "user", "content": q}]) for q in QUESTIONS]
        alone = answers(llm, prompts, options.tokens, None)
    with LLM(options.model, tp_size=options.tp_size, **common) as llm:
        shared = answers(llm, prompts, options.tokens, alone.tokens)
    found = compared(alone, shared)
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
    print(json.dumps({"model": options.model, "tp_size": options.tp_size, **found}))


if __name__ == "__main__":
    main()
