"""What test_tokenizers.py and test_chat_template.py share (``TOGETHER`` in tests/conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def plain(embedded_path: Path) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of the embedded model, as its GGUF reader makes it in some five seconds."""
    return AutoTokenizer.from_pretrained(embedded_path.parent, gguf_file=embedded_path.name)
