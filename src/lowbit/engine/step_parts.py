"""What a step is made of: its chunks' parts, their rows of the logits, what is chosen from them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowbit.engine.choices import Ask, Choices
from lowbit.engine.messages import TokenLogprob
from lowbit.engine.scheduler import Chunk
from lowbit.engine.sequence import Sequence


@dataclass(frozen=True)
class Part:
    """A chunk's part of a step. Rows ``first`` to ``known`` of the logits are its known tokens' that are
    wanted; its drafts' follow. ``chooses``: whether a token is chosen from row ``known - 1``."""

    chunk: Chunk
    start: int  # tokens computed before
    first: int
    known: int
    chooses: bool


@dataclass(frozen=True)
class Step:
    """A step that was launched."""

    parts: list[Part]
    choices: Choices


@dataclass(eq=False)
class Turn:
    """A sequence's part of a step: the tokens chosen so far. ``row``: of the logits, for the next of them."""

    sequence: Sequence
    drafts: tuple[int, ...]
    row: int
    guessed: bool = True  # the drafts
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def continues(self) -> bool:
        """Whether the last token is the draft computed there, so that the logits behind it are right too."""
        count = len(self.tokens)
        return count <= len(self.drafts) and self.tokens[-1] == self.drafts[count - 1]


def wanted_rows(chunks: list[Chunk]) -> tuple[list[int], list[Part]]:
    """The token rows whose logits are needed, and each chunk's part of the step."""
    rows: list[int] = []
    parts: list[Part] = []
    first = 0
    for chunk in chunks:
        sequence, last = chunk.sequence, first + chunk.count + len(chunk.drafts) - 1
        completes = chunk.completes
        if sequence.wants_prompt_logprobs:
            wanted = list(range(first, last + 1))
        else:
            wanted = list(range(last - len(chunk.drafts), last + 1)) if completes else []
        known = len(rows) + len(wanted) - len(chunk.drafts)
        chooses = completes and not sequence.request.echo_only
        parts.append(Part(chunk, sequence.computed, len(rows), known, chooses))
        rows += wanted
        first = last + 1
    return rows, parts


def tokens_of(chunks: list[Chunk]) -> int:
    return sum(chunk.count + len(chunk.drafts) for chunk in chunks)


def targets(part: Part) -> list[tuple[int, int]]:
    """(row of logits, place of the prompt token that it predicts) of a chunk all of whose rows are wanted."""
    rows = range(part.first, part.known)
    places = [(row, part.start + 1 + offset) for offset, row in enumerate(rows)]
    return [(row, target) for row, target in places if target < part.chunk.sequence.prompt_length]


def asks(part: Part) -> list[Ask]:
    """What the device is asked of a chunk's rows; a draft's row as if the draft were right."""
    sequence = part.chunk.sequence
    asks = []
    if sequence.wants_prompt_logprobs:
        prompt = sequence.request.prompt
        asks = [Ask(row, sequence, target, prompt[target]) for row, target in targets(part)]
    if part.chooses:
        length = part.start + part.chunk.count
        rows = range(part.known - 1, part.known + len(part.chunk.drafts))
        asks += [Ask(row, sequence, length + offset) for offset, row in enumerate(rows)]
    return asks
