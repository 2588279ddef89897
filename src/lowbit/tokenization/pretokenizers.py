"""How byte-level BPE vocabularies cut text into words: GGUF's pre-tokenizer names -> regular expressions.

A GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``) instead of carrying it. Each name stands for a
sequence of patterns; every match of one becomes a piece of its own, the text between is cut by the next.
"""

from __future__ import annotations

from lowbit.errors import LowbitError, printable

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_TAIL}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
GPT4O = "|".join(f"{word}{_CONTRACTIONS}?" for word in _CASED) + rf"|\p{{N}}{{1,3}}|{_CASED_TAIL}"
TEKKEN = "|".join(_CASED) + rf"|\p{{N}}|{_CASED_TAIL}"
_CJK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_V3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# DeepSeek LLM's and V2's class of letters: those of two cases, of an older Unicode and of fewer scripts.
_CASED_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8a\u2d00-\u2d2d\ua790-\uab68"
    r"\x{10570}-\x{105bc}\x{10d50}-\x{10d85}\x{16e40}-\x{1df2a}]]"
)

# name: patterns, in the order they are applied. ``DIGITS`` and ``GPT2`` have fast paths of their own.
DIGITS = r"\p{N}"
_TABLE: dict[tuple[str, ...], tuple[str, ...]] = {
    (
        *("default", "gpt-2", "gpt2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "mpt"),
        *("jina-v1-en", "jina-v2-code", "olmo", "jais", "trillion", "granite-docling", "mellum", "a.x-4.0"),
        *("roberta-bpe", "exaone4", "modern-bert", "gigachat"),
    ): (GPT2,),
    (*("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),): (
        DIGITS,
        GPT2,
    ),
    (
        *("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "chatglm-bpe", "glm4", "glm5", "falcon3"),
        *("pixtral", "midm-2.0", "lfm2", "falcon-h1", "jina-v5-nano"),
    ): (LLAMA3,),
    (
        *("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "solar-open", "kormo", "f2llmv2"),
        "grok-2",
    ): (QWEN2,),
    ("qwen35",): (QWEN35,),
    ("bailingmoe", "bailingmoe2", "llada-moe"): (QWEN2.replace(r"\s*[\r\n]+", r"\s*[\r\n]"),),
    ("seed-coder",): (QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+"),),
    ("minicpm5",): (r"\p{N}{1,3}", QWEN2.replace(r"|\p{N}|", r"|\p{N}+|")),
    ("gpt-4o", "llama4", "gpt-oss", "kanana2", "minimax-m2", "talkie"): (GPT4O,),
    ("tiny_aya", "cohere2moe"): (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O),
    ("youtu",): (
        r"[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
        r"\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        GPT4O.replace(r"\p{N}{1,3}", r"\p{N}"),
    ),
    ("tekken",): (TEKKEN,),
    ("falcon",): (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"),
    ("deepseek-llm",): (
        r"[\r\n]",
        rf"\s?{_CASED_LETTERS}+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _CJK,
        r"\p{N}+",
    ),
    ("deepseek-coder",): (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGITS),
    ("deepseek-v3", "deepseek3-llm", "hunyuan-v1-moe", "hunyuan-dense", "joyai-llm", "hy_v4"): (
        r"\p{N}{1,3}",
        r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _DEEPSEEK_V3_WORDS,
    ),
    ("viking",): (r" ?[^(\s|.,!?…。，、।۔،)]+", DIGITS),
    ("bloom", "poro-chat", "gpt3-finnish"): (r" ?[^(\s|.,!?…。，、।۔،)]+",),
}
PRE_TOKENIZERS = {name: patterns for names, patterns in _TABLE.items() for name in names}

# Those of Llama 3's and Tekken's kind, whose files put BOS before a text where they do not say whether.
ADDS_BOS = frozenset(
    {
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        *("jina-v5-nano", "tekken"),
    }
)
# Vocabularies whose whole-word entries win over merges (of tiktoken's origin).
IGNORES_MERGES = ADDS_BOS | {"smaug-bpe", "glm4", "glm5", "youtu", "minicpm5"}


def pre_tokenizer(name: str, file: str) -> dict[str, object]:
    """The pre-tokenizer of a GGUF name, as the ``tokenizers`` library spells it, or E0254."""
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise LowbitError(
            "E0254",
            f"{file}: tokenizer.ggml.pre {printable(name)!r} is not known; known: {known}. "
            "Pass --tokenizer <folder or repo> of the base model",
        )
    steps: list[dict[str, object]] = []
    patterns = PRE_TOKENIZERS[name]
    for pattern in patterns:
        if pattern == DIGITS:
            steps.append({"type": "Digits", "individual_digits": True})
        elif pattern == GPT2 and pattern == patterns[-1]:
            steps.append(
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
            )
            return {"type": "Sequence", "pretokenizers": steps}
        else:
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            steps.append(split)
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": steps}
