"""A tokenizer from the files of a folder: tokenizer.json, vocab.json with merges.txt, or tekken.json."""

from __future__ import annotations

from lowbit.checkpoint.documents import read_json, read_text
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.tokenization.fast_tokenizer import FastTokenizer, Specials, check_source
from lowbit.tokenization.pretokenizers import pre_tokenizer
from lowbit.tokenization.special_tokens import added_tokens, named_tokens
from lowbit.tokenization.tekken import tekken_source

Json = dict[str, object]

# Classes of transformers that put BOS before a text and EOS behind it as tokenizer_config.json says, whatever
# tokenizer.json's post-processor does (DeepSeek's puts none); and their BOS where no file names one.
_TOLD_WHAT_TO_ADD = {
    **dict.fromkeys(("LlamaTokenizer", "CodeLlamaTokenizer"), "<s>"),
    "GemmaTokenizer": "<bos>",
    "CohereTokenizer": "<BOS_TOKEN>",
}

# Of vocab.json and merges.txt: class -> how text is cut (a name of GGUF's), and normalized before that.
_NFC: Json = {"type": "NFC"}
_PATTERNS: dict[str, tuple[str, Json | None]] = {
    "GPT2Tokenizer": ("gpt-2", None),
    "CodeGenTokenizer": ("gpt-2", None),
    "GPTNeoXTokenizer": ("gpt-2", _NFC),
    "Qwen2Tokenizer": ("qwen2", _NFC),
    "Qwen3_5Tokenizer": ("qwen35", _NFC),
}
# Where no class is named: by config.json's model_type.
_BY_MODEL = dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer")


def folder_tokenizer(
    header: CheckpointHeader, stop_ids: frozenset[int], rows: int | None = None
) -> FastTokenizer:
    """The tokenizer of a folder; ``stop_ids``: what generation_config.json names; ``rows``: of the embedding
    that it is for."""
    config = read_json(header, "tokenizer_config.json") or {}
    named = named_tokens(header)
    found = _found(header, config)
    if found is None:
        raise _no_tokenizer(header)
    values, place = found
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    adds_bos, adds_eos = _adds(config, values) if name in _TOLD_WHAT_TO_ADD else (None, None)
    if place == "vocab.json":  # there is no post-processor
        adds_bos, adds_eos = (config.get(f"add_{end}_token") is True for end in ("bos", "eos"))
    specials = Specials(
        bos=named.get("bos_token", _TOLD_WHAT_TO_ADD.get(name)),
        eos=named.get("eos_token"),
        stop_ids=stop_ids,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
    )
    if place == "tekken.json":
        specials = Specials(bos="<s>", eos="</s>", stop_ids=stop_ids, adds_bos=True)
    return FastTokenizer(check_source(values, place, rows, (specials.bos, specials.eos)), specials)


def _found(header: CheckpointHeader, config: Json) -> tuple[Json, str] | None:
    """tokenizer.json's object, made of other files where there is none, and the file it is from."""
    whole = read_json(header, "tokenizer.json")
    if whole is not None:
        return whole, "tokenizer.json"
    vocabulary, merges = read_json(header, "vocab.json"), read_text(header, "merges.txt")
    if vocabulary is not None and merges is not None:
        return _byte_level(header, vocabulary, merges, config), "vocab.json"
    tekken = read_json(header, "tekken.json")
    return None if tekken is None else (tekken_source(tekken), "tekken.json")


def _adds(config: Json, values: Json) -> tuple[bool | None, bool | None]:
    """Whether BOS and EOS are put around a text; None: as tokenizer.json's post-processor does."""
    bos, eos = (config.get(key) for key in ("add_bos_token", "add_eos_token"))
    told = isinstance(bos, bool) or isinstance(eos, bool)
    # transformers 5 no longer writes these keys, only the post-processor that follows from them.
    if not told and "TemplateProcessing" in str(values.get("post_processor")):
        return None, None
    return bos if isinstance(bos, bool) else True, eos if isinstance(eos, bool) else False


def _no_tokenizer(header: CheckpointHeader) -> LowbitError:
    found = " (tokenizer.model alone is not read: convert it to tokenizer.json)"
    has_model = (header.root / "tokenizer.model").exists()
    return LowbitError(
        "E0250",
        f"no tokenizer in {header.root.name} (looked for tokenizer.json, vocab.json+merges.txt, tekken.json)"
        f"{found if has_model else ''}; pass --tokenizer <dir or repo> of the base model",
    )


def _byte_level(header: CheckpointHeader, vocabulary: Json, merges: str, config: Json) -> Json:
    """GPT-2's files of two, as tokenizer.json has them; how text is cut is known by the class alone."""
    told = config.get("tokenizer_class", header.config.get("tokenizer_class"))
    if told is None:
        told = _BY_MODEL.get(str(header.config.get("model_type")), "GPT2Tokenizer")
    pattern, normalizer = _PATTERNS.get(str(told).removesuffix("Fast"), (None, None))
    if pattern is None:
        raise LowbitError(
            "E0250",
            f"{header.root.name}: vocab.json and merges.txt alone are read of tokenizer_class "
            f"{', '.join(_PATTERNS)}, not of {printable(repr(told))}; pass --tokenizer <dir or repo> of the "
            "base model",
        )
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    added = added_tokens(header, vocabulary)
    numbers = {str(token["content"]): token["id"] for token in added}  # where the library looks for them
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer(pattern, "vocab.json"),
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary | numbers, "merges": lines},
    }
