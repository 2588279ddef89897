"""Varied strings for tokenizer tests: languages, code, emoji, whitespace, control and special tokens."""

# ruff: noqa: E501 (a wide table reads better than a long one)

from __future__ import annotations

import random
from pydoc_data.topics import topics

SAMPLES = [
    "Hello, world!", "It's we're I'LL they'd YOU'VE don't", "1234567890 3.14159 1,000,000 0x1F 10^-3",
    "Ünïcödé — “quotes” … naïve café", "Привет, как дела? Всё хорошо.", "你好，世界！今天天气很好。",
    "こんにちは世界。カタカナとひらがな", "안녕하세요 세계", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "Γειά σου Κόσμε", "😀😃🎉 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽", "e\u0301 a\u0300\u0301 \u200d\u200b\ufeff", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛",
    "def f(x):\n    return x ** 2  # power\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }", "<html><body>&amp;</body></html>",
    "SELECT * FROM t WHERE a='b' AND c<>3;", "\t\ttabs\tand  spaces   here    ", "\n\n\nlines\r\nwindows\r\n\r\nend\n", "   leading",
    "trailing   ", " ", "  ", "\n", "\t", "\r", "a", "", "\x00\x01\x02\x7f", "\u2028\u2029\x85\xa0", "ÀÉÎÕÜ ß ǅ ŉ", "½ ⅔ Ⅷ ① ² ₃ ٣ ४",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "https://example.com/a/b?c=d&e=%20f#g", "user@example.org",
    "camelCaseAndPascalCase snake_case kebab-case SCREAMING_CASE", "C++ C# F# .NET node.js", "$100 €50 ¥1000 £3.50 50% #tag @user",
    "\ufffd\ufffe\U0010ffff\U000e0001", "(a)[b]{c}<d>\"e\"'f'`g`", "...!!!???---___===+++***///\\\\\\|||~~~^^^&&&",
]  # fmt: skip
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<|eot_id|>", "[INST]"]


def varied_texts(count: int = 2200, seed: int = 0) -> list[str]:
    """``count`` strings: the samples, pieces of prose, random mixtures, special tokens in between."""
    draw = random.Random(seed)
    prose = "\n".join(topics[name] for name in ("types", "execmodel", "import"))
    texts = list(SAMPLES)
    while len(texts) < count:
        kind = draw.randrange(5)
        if kind == 0:
            start = draw.randrange(len(prose) - 400)
            texts.append(prose[start : start + draw.randrange(1, 400)])
        elif kind == 1:
            texts.append("".join(draw.choice(SAMPLES) for _ in range(draw.randrange(2, 5))))
        elif kind == 2:
            parts = [draw.choice(SAMPLES + SPECIALS * 3) for _ in range(draw.randrange(2, 6))]
            texts.append(draw.choice(["", " ", "\n", "  "]).join(parts))
        elif kind == 3:
            ranges = [
                (32, 127),
                (32, 127),
                (0xA0, 0x250),
                (0x370, 0x600),
                (0x4E00, 0x4F00),
                (0x1F600, 0x1F640),
            ]
            low, high = draw.choice(ranges)
            texts.append("".join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(1, 60))))
        else:
            sample = draw.choice(SAMPLES)
            cut = draw.randrange(len(sample) + 1)
            texts.append(sample[cut:] + " " * draw.randrange(4) + str(draw.randrange(10**9)) + sample[:cut])
    return texts
