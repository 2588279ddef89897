"""llama.cpp through llama-cpp-python's low-level calls: batches of several sequences, greedy.

Options: model (GGUF file), threads. Variants: flash attention on and off, each with micro-batches of 512 and
2048 tokens. One context at a time is kept, with separate (not unified) key-value buffers, which are faster
where many sequences run. Prompts go in first, up to 2048 tokens a call, then all sequences decode in step.
Its own prompt cache is not used, but where the question allows copies: then the longest prompt is computed
once and copied into the other sequences, cut to their lengths, to spare minutes of prefill before a decode
measurement (attention costs the same whatever the numbers are).
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np
from line_protocol import Lines, Pairs, options

BATCH = 2048
VARIANTS = {
    f"flash attention {word}, micro-batch {micro}": (flash, micro)
    for word, flash in (("on", 1), ("off", 0))
    for micro in (512, 2048)
}


class Llama:
    """A model and at most one context."""

    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._threads = threads
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._key: tuple[int, int, str] | None = None
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def complete(self, prompts: list[list[int]], max_tokens: int, variant: str, copied: bool) -> Pairs:
        longest = max(map(len, prompts))
        self._prepare(len(prompts), -(-(longest + max_tokens) // 256) * 256, variant)
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, True)
        if copied:
            self._fill(prompts, memory)
        return self._run(prompts, max_tokens, [len(p) - 1 if copied else 0 for p in prompts])

    def logits(self, prompt: list[int], variant: str) -> Any:
        """float32 (tokens, vocabulary) of one prompt."""
        self._prepare(1, -(-len(prompt) // 256) * 256, variant)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        found = []
        for start in range(0, len(prompt), BATCH):
            part = prompt[start : start + BATCH]
            self._submit([(token, start + place, 0, True) for place, token in enumerate(part)])
            found += [self._row(place).copy() for place in range(len(part))]
        return np.stack(found)

    def _prepare(self, sequences: int, length: int, variant: str) -> None:
        key = (sequences, length, variant)
        if self._key == key:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        flash, micro = VARIANTS[variant]
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = sequences * length
        parameters.n_seq_max = sequences
        parameters.n_batch, parameters.n_ubatch = BATCH, micro
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.flash_attn_type = flash
        parameters.kv_unified = False
        parameters.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._key = key
        if not self._context:
            self._context = self._key = None
            raise RuntimeError(f"no context for {sequences} sequences of {length} tokens, {variant}")

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """entries: (token, position, sequence, wanted); greedy tokens of the wanted ones, in order."""
        self._submit(entries)
        return [int(self._row(place).argmax()) for place, entry in enumerate(entries) if entry[3]]

    def _row(self, place: int) -> Any:
        """Logits after the entry at ``place``, until the next batch."""
        logits = llama_cpp.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(logits, (self._words,))

    def _submit(self, entries: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(entries)
        for place, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[place] = token
            batch.pos[place] = position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status} for {len(entries)} tokens")

    def _fill(self, prompts: list[list[int]], memory: Any) -> None:
        """Contexts of all prompts but for their last tokens, by copying the longest."""
        source = max(range(len(prompts)), key=lambda number: len(prompts[number]))
        whole = prompts[source][:-1]
        for start in range(0, len(whole), BATCH):
            part = whole[start : start + BATCH]
            self._decode([(token, start + i, source, False) for i, token in enumerate(part)])
        for sequence, prompt in enumerate(prompts):
            if sequence != source:
                llama_cpp.llama_memory_seq_cp(memory, source, sequence, -1, -1)
                llama_cpp.llama_memory_seq_rm(memory, sequence, len(prompt) - 1, -1)

    def _run(self, prompts: list[list[int]], max_tokens: int, known: list[int]) -> Pairs:
        """Every prompt from token ``known[i]`` on, then all sequences in step."""
        began = time.perf_counter()
        ids: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]

        def note(sequences: list[int], tokens: list[int]) -> None:
            now = time.perf_counter() - began
            for sequence, token in zip(sequences, tokens, strict=True):
                ids[sequence].append(token)
                times[sequence].append(now)

        waiting = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
            if position >= known[sequence]
        ]
        for start in range(0, len(waiting), BATCH):
            part = waiting[start : start + BATCH]
            note([entry[2] for entry in part if entry[3]], self._decode(part))
        for step in range(1, max_tokens):
            entries = [
                (ids[sequence][-1], len(prompt) + step - 1, sequence, True)
                for sequence, prompt in enumerate(prompts)
            ]
            note(list(range(len(prompts))), self._decode(entries))
        return list(zip(ids, times, strict=True))


def main() -> None:
    lines, asked = Lines(), options()
    llama = Llama(asked["model"], asked["threads"])
    llama.complete([[1]], 1, next(iter(VARIANTS)), False)
    system = llama_cpp.llama_print_system_info().decode()
    details = {"system": system, "prefix_cache": False}
    lines.answer(llama_cpp.__version__, details, list(VARIANTS), llama.complete, llama.logits)


if __name__ == "__main__":
    main()
