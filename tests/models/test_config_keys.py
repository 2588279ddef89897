"""Keys of a config: what is absurd is refused, what is left out is what transformers takes."""

from __future__ import annotations

import pytest

from lowbit.errors import LowbitError
from lowbit.models.config_keys import ConfigKeys
from lowbit.models.families.common import windows_of


def test_booleans_are_no_numbers() -> None:
    keys = ConfigKeys({"count": False, "numbers": [1.0, True]}, "config.json")
    with pytest.raises(LowbitError, match="'count' must be a whole number"):
        keys.count("count")
    with pytest.raises(LowbitError, match="'numbers' must be a list of positive numbers"):
        keys.numbers("numbers")
    assert ConfigKeys({"count": 0, "none": None}, "").count("count") == 0
    assert ConfigKeys({"count": 0, "none": None}, "").count("none") == 0


@pytest.mark.parametrize(
    ("told", "first"), [({}, 28), ({"max_window_layers": 3}, 3), ({"max_window_layers": 0}, 0)]
)
def test_windows_begin_where_transformers_has_them(told: dict[str, object], first: int) -> None:
    """Qwen2Config's own default is 28 layers without a window."""
    qwen = pytest.importorskip("transformers").Qwen2Config
    values = {"sliding_window": 64, **told}
    theirs = qwen(use_sliding_window=True, num_hidden_layers=32, **values).layer_types
    ours = windows_of(ConfigKeys(values, "config.json"), 32)
    assert [bool(window) for window in ours] == [kind == "sliding_attention" for kind in theirs]
    assert ours.index(64) == first
