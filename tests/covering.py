"""A pytest plugin, ``-p covering``: of every test's parametrised grid as many cases as meet each value once.

For tests run again in another setting, where the whole grid ran in the first.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the order they are in, a case stays that has a value which none before it had."""
    met: set[tuple[str, str, int]] = set()  # (test, parameter, which object its value is)
    kept, left_out = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)
        values = {} if callspec is None else callspec.params
        new = {(item.nodeid.partition("[")[0], name, id(value)) for name, value in values.items()} - met
        met |= new
        (kept if new or not values else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
