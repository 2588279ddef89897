"""A head stored beside a tied embedding: a copy of it, or another one."""

from __future__ import annotations

import re

from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.doctor.correction import Correction
from lowbit.doctor.rules import Report
from lowbit.doctor.values import Check, Digest
from lowbit.errors import printable

_EMBEDDING = re.compile(r"(?:.*\.)?embed_tokens\.weight")


class Heads:
    """Embedding and head of a tied checkpoint, compared by their hashes: each is read once."""

    def __init__(self, header: CheckpointHeader, tied: bool) -> None:
        names = list(header.tensors) if tied and header.container != "gguf" else []
        heads = [name for name in names if name.startswith("lm_head.")]
        self.head = heads[0] if heads else ""
        self.embedding = next((name for name in names if _EMBEDDING.fullmatch(name)), "")
        self.entries: tuple[TensorEntry, ...] = ()
        if self.head and self.embedding:
            self.entries = header.tensors[self.head], header.tensors[self.embedding]
        self._digests = {name: Digest() for name in (self.head, self.embedding)}

    def checks(self) -> dict[str, list[Check]]:
        """What must see the two tensors."""
        return {name: [digest] for name, digest in self._digests.items()} if self.entries else {}

    def judge(self, report: Report, correction: Correction) -> None:
        """D115, D116, after the scan."""
        if not self.entries:
            return
        head, embedding = self.entries
        same = head.dtype == embedding.dtype and head.shape == embedding.shape
        same = same and self._digests[self.head].value == self._digests[self.embedding].value
        file, shown = head.file.name, printable(head.name)
        if same:
            report.add(
                "D116",
                f"{file}: tensor {shown!r} is the same as {printable(embedding.name)!r}, which the config "
                "says serves as head",
                file=file,
                tensor=head.name,
                fix=f"{head.name} left out",
            )
            correction.dropped.add(head.name)
            return
        report.add(
            "D115",
            f"{file}: tensor {shown!r} ({head.dtype} {list(head.shape)}) differs from "
            f"{printable(embedding.name)!r} ({embedding.dtype} {list(embedding.shape)}), but the config says "
            "the embedding serves as head; set tie_word_embeddings to false if the stored head is right",
            file=file,
            tensor=head.name,
        )
