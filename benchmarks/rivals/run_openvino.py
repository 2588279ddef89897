"""OpenVINO GenAI's continuous batching, greedy. Options: model (folder of OpenVINO files), threads.

Variants: how many tokens a step may hold. Prefixes are cached; precision is its default for the processor
(bf16 where it has it), the cache's type what the model's files ask for (16 bits where its GGUF reader made
them). The pipeline gives no logits: they come from the same files through the same transformation to paged
attention, compiled with the same properties.
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
MODEL = "openvino_model.xml"
PAGE = 32  # tokens, on a CPU


class OpenVino:
    """The pipelines made so far, one a variant."""

    def __init__(self, path: str, threads: int) -> None:
        self._path = path
        self._properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipelines: dict[str, Any] = {}
        self._paged: Any = None
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
        made = genai.ContinuousBatchingPipeline(self._path, scheduler, "CPU", self._properties)
        self._pipelines[variant] = made
        return made

    def logits(self, prompt: list[int], variant: str) -> Any:
        """float32 (tokens, vocabulary) of one prompt, in steps as the variant has them."""
        if self._paged is None:
            self._paged = _paged_model(Path(self._path) / MODEL, self._properties)
        request = self._paged.create_infer_request()
        for port in self._paged.inputs:
            if port.any_name.startswith(("key_cache.", "value_cache.")):
                # (pages, heads, tokens, width); bytes have their scales in one of the last two
                page = [dimension.get_length() for dimension in list(port.partial_shape)[1:]]
                shape = ov.Shape([-(-len(prompt) // PAGE), *page])
                request.set_tensor(port.any_name, ov.Tensor(port.element_type, shape))
        found = []
        for start in range(0, len(prompt), VARIANTS[variant]):
            part = prompt[start : start + VARIANTS[variant]]
            end = start + len(part)
            request.set_tensor("input_ids", ov.Tensor(np.array(part, np.int64)))
            request.set_tensor("position_ids", ov.Tensor(np.arange(start, end, dtype=np.int64)))
            for name, value in {
                "max_context_len": end,
                "past_lens": [start],
                "subsequence_begins": [0, len(part)],
                "block_indices": list(range(-(-end // PAGE))),
                "block_indices_begins": [0, -(-end // PAGE)],
            }.items():
                request.set_tensor(name, ov.Tensor(np.array(value, np.int32)))
            request.infer()
            found.append(request.get_tensor("logits").data.reshape(len(part), -1).copy())
        return np.concatenate(found)


def _paged_model(path: Path, properties: dict[str, Any]) -> Any:
    """The model as the pipeline runs it."""
    from openvino._offline_transformations import paged_attention_transformation

    core = ov.Core()
    model = core.read_model(path)
    paged_attention_transformation(model)
    return core.compile_model(model, "CPU", properties)


def main() -> None:
    lines, asked = Lines(), options()
    engine = OpenVino(asked["model"], asked["threads"])
    engine.complete([[1]], 1, next(iter(VARIANTS)), False)
    details = {"prefix_cache": True, "files": [file.name for file in Path(asked["model"]).iterdir()]}
    lines.answer(genai.__version__, details, list(VARIANTS), engine.complete, engine.logits)


if __name__ == "__main__":
    main()
