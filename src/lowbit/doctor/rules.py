"""The rules of the checkpoint doctor, what it finds by them, and docs/check.md.

A rule keeps its number for ever, like an error code. The first digit is its kind: 0 files, 1 config and
names, 2 numbers, 3 GPTQ packing, 4 the model as a whole. ``make docs`` writes the page.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from lowbit.errors import LowbitError, printable

Severity = Literal["error", "warning", "note"]
MAX_MESSAGE = 600


@dataclass(frozen=True)
class Rule:
    """``fixed``: what ``--fix`` does about it, or under which condition; empty where it does nothing."""

    severity: Severity
    title: str
    explanation: str
    fixed: str = ""


RULES: dict[str, Rule] = {
    "D001": Rule(
        "error",
        "a file cannot be read",
        "A file is damaged, cut off, not what its name says, or its header is impossible.",
    ),
    "D002": Rule("error", "a shard is missing", "The index names a file that is not in the folder."),
    "D003": Rule("error", "a tensor is stored twice", "Two files hold a tensor of the same name."),
    "D004": Rule(
        "error",
        "index and shards disagree",
        "The index names a tensor no shard holds, puts one in the wrong shard, or leaves one out.",
        "the index is written anew from the shards, if all of them can be read",
    ),
    "D005": Rule(
        "warning",
        "a shard the index does not name",
        "A file called like a shard is not part of the model; it may be left from another version.",
    ),
    "D006": Rule(
        "error",
        "a file's hash is another",
        "SHA256SUMS in the folder, or the hub's cache, knows a SHA-256 the file does not have.",
    ),
    "D007": Rule(
        "error",
        "an unfinished output",
        "The folder is what a conversion that was broken off left: not all of it is there. The same command "
        "goes on with it.",
    ),
    "D101": Rule(
        "error",
        "missing tensor",
        "The architecture needs a tensor that none of the checkpoint's files holds.",
    ),
    "D102": Rule(
        "error", "tensor without a place", "The checkpoint holds tensors the architecture has no use for."
    ),
    "D103": Rule(
        "error", "shape disagrees with the config", "A tensor has other dimensions than the config asks for."
    ),
    "D104": Rule(
        "error",
        "format not recognised",
        "No reader of lowbit, or more than one, claims the checkpoint; or its method is known but not read.",
    ),
    "D105": Rule(
        "error",
        "impossible quantization config",
        "The quantization config lacks a key, or a value is of the wrong type or outside what formats have.",
    ),
    "D106": Rule(
        "error",
        "packing contradicts the quantization config",
        "A tensor's dtype or shape cannot hold what the quantization config says.",
    ),
    "D107": Rule("error", "bad config", "A key of the config is missing, or has a value no model can have."),
    "D108": Rule(
        "warning",
        "not supported by lowbit",
        "An architecture, or a variant of one or of a format, that is not built in; not all rules could be "
        "tried.",
    ),
    "D109": Rule(
        "warning",
        "config and tensors disagree",
        "The tensors prove something else than the config says; lowbit follows the tensors.",
    ),
    "D110": Rule(
        "error",
        "a quantization config, but no quantized tensor",
        "The config says the model is quantized and every tensor is a plain float: it was dequantized, and "
        "the config kept.",
        "the quantization config is removed",
    ),
    "D111": Rule(
        "error",
        "quantized tensors, but no quantization config",
        "Tensors only quantized checkpoints have are there, and nothing says how they are to be read.",
    ),
    "D112": Rule(
        "warning",
        "unusual prefix of names",
        "Tensor names begin with the prefix of another kind of model; lowbit reads them, others may not.",
        "the tensors are renamed, if all of them have a place under the usual prefix",
    ),
    "D113": Rule(
        "error",
        "wrong prefix of names",
        "Tensor names begin with a prefix of some training or merging tool, so that none is found.",
        "the tensors are renamed, if all of them have a place under the usual prefix",
    ),
    "D114": Rule(
        "error",
        "no output head",
        "There is no lm_head, and the config does not say that the embedding serves as one.",
        "tie_word_embeddings is set to true, if config.json does not have the key",
    ),
    "D115": Rule(
        "warning",
        "tied, but with a head of its own",
        "The config says the embedding serves as output head, and a different lm_head is stored; lowbit uses "
        "the one that is stored, other programs may not.",
    ),
    "D116": Rule(
        "warning",
        "the tied head is stored again",
        "The config says the embedding serves as output head, and a copy of it is stored as lm_head, which "
        "nobody needs.",
        "the copy is left out",
    ),
    "D117": Rule(
        "error",
        "tokenizer and embedding do not fit",
        "The tokenizer can make ids that the embedding has no row for.",
    ),
    "D118": Rule(
        "error",
        "vocab_size is not the embedding's",
        "The embedding or the output head has another number of rows than vocab_size says.",
    ),
    "D119": Rule(
        "note",
        "no dtype in the config",
        "config.json has neither dtype nor torch_dtype; some programs then load the model as float32.",
    ),
    "D120": Rule(
        "note",
        "no tokenizer",
        "The checkpoint has no tokenizer of its own; it needs --tokenizer to be served.",
    ),
    "D121": Rule("error", "unusable tokenizer", "The tokenizer's files are damaged or of an unknown kind."),
    "D201": Rule(
        "error", "NaN or infinity in a tensor", "A weight, norm or bias holds numbers that are not finite."
    ),
    "D202": Rule(
        "error",
        "NaN or infinite scale",
        "A scale of quantized weights or inputs is not finite; every weight it covers would be NaN.",
    ),
    "D203": Rule("error", "NaN in an FP8 weight", "A weight of 8-bit floats holds codes that stand for NaN."),
    "D204": Rule(
        "error", "NaN in an exponent scale", "A scale that is a power of two (e8m0) has the byte 0xFF: NaN."
    ),
    "D205": Rule("error", "NaN or infinite block scale", "The scale inside a GGUF block is not finite."),
    "D206": Rule(
        "note",
        "zero scales",
        "Scales are zero, so that the weights they cover are; usual for rows of unused tokens only.",
    ),
    "D207": Rule(
        "error",
        "codes out of range",
        "A weight's codes or zero points lie outside what the config's number of bits can hold.",
    ),
    "D208": Rule(
        "note",
        "a matrix of zeros",
        "All of a matrix is zero; a download that was never filled in looks like this.",
    ),
    "D301": Rule(
        "warning",
        "GPTQ v1 or v2 zero points",
        "The zero points prove the other of GPTQ's two forms than checkpoint_format says.",
        "checkpoint_format is set to what every module proves",
    ),
    "D302": Rule(
        "warning",
        "sym, but zero points differ",
        "The config says sym and the stored zero points are not all the same.",
        "sym is set to false, if that changes no module's meaning",
    ),
    "D303": Rule(
        "error",
        "g_idx is missing",
        "desc_act is true, and without g_idx nobody knows the group of each column.",
    ),
    "D304": Rule(
        "error", "g_idx out of range", "g_idx has a wrong length or names groups that do not exist."
    ),
    "D305": Rule(
        "error",
        "g_idx with groups of wrong sizes",
        "g_idx does not give each group its number of columns: it is no permutation of the groups.",
    ),
    "D306": Rule(
        "warning",
        "reordered columns, but desc_act is false",
        "g_idx puts columns into other groups than their place says; lowbit follows g_idx.",
        "desc_act is set to true",
    ),
    "D307": Rule(
        "warning",
        "g_idx was never filled in",
        "g_idx is all zero while there are several groups and desc_act is false; lowbit ignores it.",
        "g_idx is written as i // group_size",
    ),
    "D308": Rule(
        "note",
        "no g_idx",
        "desc_act is false and g_idx is not stored; lowbit needs none, some programs do.",
        "g_idx is added as i // group_size",
    ),
    "D309": Rule(
        "note",
        "symmetric, but sym is false",
        "Every zero point is the middle; programs with faster symmetric kernels would not use them.",
        "sym is set to true",
    ),
    "D310": Rule(
        "warning",
        "zero points damaged by a borrow",
        "Words of zero points end in fields of all ones, as AutoGPTQ left them when a zero point was 0; the "
        "overwritten ones are lost.",
    ),
    "D311": Rule(
        "note",
        "desc_act, but no reordered column",
        "desc_act is true and every g_idx is i // group_size; kernels for reordered columns are slower.",
        "desc_act is set to false",
    ),
    "D401": Rule(
        "note",
        "perplexity of an English paragraph",
        "The model was loaded and its perplexity measured on a few fixed English sentences: usually below 40 "
        "for models of human language.",
    ),
    "D402": Rule(
        "warning",
        "worse than guessing",
        "Perplexity is above the number of tokens: the model predicts English worse than a random guess. "
        "Sound files of an untrained model do that; otherwise the weights are misread or damaged.",
    ),
    "D403": Rule(
        "note",
        "perplexity not measured",
        "No tokenizer, not enough memory, no kernel, or errors found before.",
    ),
    "D404": Rule("error", "the model computes NaN", "The logits of an English paragraph are not finite."),
    "D405": Rule("error", "the model does not load", "Loading the model ends in an error."),
}

# Errors of the readers -> rules; the rest is D107.
_BY_CODE = {
    "E0209": "D101",
    "E0217": "D102",
    "E0210": "D103",
    "E0211": "D104",
    "E0212": "D105",
    **dict.fromkeys(("E0213", "E0219"), "D106"),
    "E0214": "D109",
    "E0215": "D202",
    **dict.fromkeys(("E0218", "E0223", "E0240", "E0241", "E0242"), "D108"),
    "E0227": "D001",
}


@dataclass(frozen=True)
class Finding:
    """``message``: a line with file, tensor, numbers and way out; ``fix``: the certain correction, if any."""

    rule: str
    message: str
    file: str = ""
    tensor: str = ""
    fix: str = ""

    @property
    def severity(self) -> Severity:
        return RULES[self.rule].severity


@dataclass
class Report:
    """Everything found; ``whole``: no file was missing or unreadable."""

    findings: list[Finding] = field(default_factory=list)
    whole: bool = True

    def add(self, rule: str, message: str, *, file: str = "", tensor: str = "", fix: str = "") -> None:
        """A finding; the same line only once."""
        finding = Finding(rule, printable(message, MAX_MESSAGE), printable(file), printable(tensor), fix)
        if finding not in self.findings:
            self.findings.append(finding)

    def add_error(self, error: LowbitError, rule: str = "", *, file: str = "", tensor: str = "") -> None:
        """What a reader refused, under its rule or the one that belongs to its code."""
        self.add(rule or _BY_CODE.get(error.code, "D107"), error.message, file=file, tensor=tensor)

    def has(self, rule: str) -> bool:
        """Whether something was found by this rule."""
        return any(finding.rule == rule for finding in self.findings)

    def errors(self, unfixed_only: bool = False) -> list[Finding]:
        """The findings that are errors; without those that have a correction."""
        errors = [finding for finding in self.findings if finding.severity == "error"]
        return [error for error in errors if not error.fix] if unfixed_only else errors

    def counts(self) -> Counter[str]:
        """How many of each severity."""
        return Counter(finding.severity for finding in self.findings)


_INTRODUCTION = """\
# The rules of `lowbit check`

Made from `src/lowbit/doctor/rules.py` by `make docs`; a test compares the two.

`lowbit check MODEL` reads all of a checkpoint and prints a line for each finding. Its exit status is 3 if one
of them is an error, else 0. `--fix OUT` writes a corrected copy where the correction is certain; the model
itself is never changed. `--json` prints the findings for programs, `--rules` this table.
"""


UNSEEN = (
    ("a square matrix stored transposed", "every shape is right", "canary"),
    ("F16 bytes labelled BF16, or the reverse", "both are 16 bits, and most numbers stay finite", "canary"),
    (
        "AWQ's nibble order in a file that says GPTQ, both shapes being equal",
        "any order of codes is legal",
        "canary",
    ),
    ("v1 zero points in an asymmetric file that says v2", "every zero point is legal", "canary"),
    ("a flipped bit of a weight, scale or bias", "it is another legal number", "hash manifest"),
    ("rope_theta, rms_norm_eps and other free numbers", "any value in their range is a model", "canary"),
    ("the width, or the kind of scale, inputs are quantized with", "nothing stored depends on it", "nothing"),
    ("weights of another model of the same sizes", "it is a sound checkpoint", "hash manifest"),
)


def rules_page() -> str:
    """docs/check.md."""
    lines = [
        _INTRODUCTION,
        "| Rule | Severity | Title | Meaning | `--fix OUT` |\n| --- | --- | --- | --- | --- |",
    ]
    for number, rule in RULES.items():
        cells = (number, rule.severity, rule.title, rule.explanation, rule.fixed)
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    lines += [
        "\n## What no rule can see\n",
        "A hash manifest is `SHA256SUMS` in the folder, or the hub's cache, whose blobs are named by their "
        "hash; the canary is the perplexity of an English paragraph (D401, D402).\n",
        "| What | Why | Found by |\n| --- | --- | --- |",
    ]
    lines += [f"| {what} | {why} | {by} |" for what, why, by in UNSEEN]
    return "\n".join(lines) + "\n"
