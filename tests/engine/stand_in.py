"""A stand-in model whose logits betray any mix-up of pages, positions or sequences, and a byte tokenizer.

Its "KV cache" stores each token's id and position; its logits are a hash of exactly what attention would see
through the page table: every token of the context, in order. A wrong page, a stale page or a skipped token
changes the next token.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from lowbit.kernels.attention import CacheSpec, LayerCache
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.numerics.cache_format import KvDtype

VOCABULARY = 64
EOS = 3


def next_token(context: list[int]) -> int:
    """What the stand-in says after ``context``."""
    state = 17
    for token in context:
        state = (state * 1000003 + token + 1) % 2147483647
    return state % VOCABULARY


def next_copied(context: list[int]) -> int:
    """Three times in four what followed the last token where it stood before, else ``next_token``."""
    fresh = next_token(context)
    earlier = [place for place in range(1, len(context)) if context[place - 1] == context[-1]]
    return context[earlier[-1]] if earlier and fresh % 4 else fresh


def continuation(prompt: list[int], count: int, stops: bool = True) -> list[int]:
    """The greedy output for ``prompt``, alone."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(tokens))
        if stops and tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class StandIn:
    """A Model with one paged layer; K holds (token, position). ``says``: what its logits are largest at."""

    vocab_size = VOCABULARY
    context_length = 400
    device = torch.device("cpu")
    kernels: frozenset[str] = frozenset()
    quantization = ""
    weight_bytes = 0
    mapped_bytes = 0
    others = ()
    config = SimpleNamespace(hidden_size=0, heads=0, kv_heads=0, head_dim=0, intermediate_size=0, moe=None)
    spans_tokens = False

    def __init__(self, says: Callable[[list[int]], int] = next_token) -> None:
        self.says = says
        self.poisoned: set[int] = set()  # tokens whose rows come out as NaN
        self.steps = 0

    def cache_specs(self) -> list[CacheSpec]:
        """One layer of two numbers a token."""
        return [CacheSpec("paged", 1, 2, 2, KvDtype.of("f32"))]

    def forward(self, batch: ForwardBatch, caches: list[LayerCache]) -> Tensor:
        """Logits of random numbers, the largest by far where ``says`` points."""
        self.steps += 1
        stored = torch.stack((batch.tokens, batch.positions), 1).float().unsqueeze(1)
        cache = caches[0]
        cache.kernel.write(cache, stored, stored, batch)
        keys = cache.buffers["k"].view(-1, 2)  # (slots, token and position)
        rows: list[list[int]] = []
        for sequence, (queries, context) in enumerate(
            zip(batch.query_lengths.tolist(), batch.context_lengths.tolist(), strict=True)
        ):
            pages = batch.page_table[sequence].tolist()
            slots = [
                pages[i // batch.page_size] * batch.page_size + i % batch.page_size for i in range(context)
            ]
            seen = keys[slots]
            assert seen[:, 1].tolist() == list(range(context)), "a page of another position was read"
            tokens = seen[:, 0].int().tolist()
            rows += [tokens[: context - queries + 1 + offset] for offset in range(queries)]
        logits = torch.zeros(len(batch.sample_rows), VOCABULARY)
        for place, row in enumerate(batch.sample_rows.tolist()):
            generator = torch.Generator().manual_seed(sum(rows[row]) * 7 + len(rows[row]))
            logits[place] = torch.rand(VOCABULARY, generator=generator)
            logits[place, self.says(rows[row])] = 5.0
            if rows[row][-1] in self.poisoned:
                logits[place, 5] = float("nan")
        return logits


class ByteTokenizer:
    """Ids are letters."""

    vocab_size = VOCABULARY
    bos_id = None
    eos_id = EOS
    stop_ids = frozenset({EOS})
    special_ids = frozenset({EOS})
    adds_bos = False

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Letters to ids."""
        return [ord(character) - 48 for character in text]

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Ids to letters."""
        return "".join(chr(48 + token) for token in ids if not (skip_special and token == EOS))

    def token_bytes(self, token: int) -> bytes:
        """One letter."""
        return chr(48 + token).encode()

    def token_text(self, token: int) -> str:
        """One letter."""
        return chr(48 + token)
