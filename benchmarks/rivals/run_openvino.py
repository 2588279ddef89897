"""OpenVINO GenAI's continuous batching, greedy. Options: model (folder of OpenVINO files), threads.

Variants: how many tokens a step may hold. Prefixes are cached, precision and cache type are its defaults for
the processor (bf16 where it has it, 8-bit keys and values).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from line_protocol import Lines, Pairs, options

VARIANTS = {"512 tokens a step": 512, "4096 tokens a step": 4096}
CACHE_GB = 4


class OpenVino:
    """The pipelines made so far, one a variant."""

    def __init__(self, path: str, threads: int) -> None:
        self._path, self._threads = path, threads
        self._pipelines: dict[str, Any] = {}
        self._sent = 0

    def complete(self, prompts: list[list[int]], max_tokens: int, variant: str, copied: bool) -> Pairs:
        pipeline = self._pipelines.get(variant) or self._make(variant)
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        inputs = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        ids: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        began = time.perf_counter()
        handles = []
        for tensor in inputs:
            self._sent += 1
            handles.append(pipeline.add_request(self._sent, tensor, config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter() - began
            for number, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        ids[number] += output.generated_ids
                        times[number] += [now] * len(output.generated_ids)
        return list(zip(ids, times, strict=True))

    def _make(self, variant: str) -> Any:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = VARIANTS[variant]
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_seqs = 64
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": self._threads, "PERFORMANCE_HINT": "LATENCY"}
        made = genai.ContinuousBatchingPipeline(self._path, scheduler, "CPU", properties)
        self._pipelines[variant] = made
        return made


def main() -> None:
    lines, asked = Lines(), options()
    engine = OpenVino(asked["model"], asked["threads"])
    engine.complete([[1]], 1, next(iter(VARIANTS)), False)
    details = {"prefix_cache": True, "files": [file.name for file in Path(asked["model"]).iterdir()]}
    lines.answer(genai.__version__, details, list(VARIANTS), engine.complete)


if __name__ == "__main__":
    main()
