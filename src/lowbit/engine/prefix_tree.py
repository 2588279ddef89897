"""PrefixTree: a radix tree of token prefixes to the pages that hold their K and V.

An edge is a run of whole pages' tokens; a lookup follows equal pages from the root and splits an edge where
it ends inside one. Pages of running sequences are never evicted; idle leaves go, least recently used first.
(RadixAttention: Zheng et al., 2024.) Different salts share nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lowbit.engine.page_pool import PagePool

PageTokens = tuple[int, ...]


@dataclass(eq=False)
class _Node:
    parent: _Node | None
    keys: list[PageTokens] = field(default_factory=list)  # the tokens of each page of the edge into this node
    pages: list[int] = field(default_factory=list)
    children: dict[PageTokens, _Node] = field(default_factory=dict)
    used: int = 0  # the clock when it was last looked up
    salt: str = ""  # of a root


class PrefixTree:
    """Cached prefixes over ``pool``'s pages of ``page_size`` tokens."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._roots: dict[str, _Node] = {}
        self._clock = 0

    def match(self, salt: str, tokens: Sequence[int], most: int) -> list[int]:
        """Pages of the longest cached prefix of ``tokens``, at most ``most`` pages; held for the caller."""
        root = self._roots.get(salt)
        if root is None:
            return []
        node, matched = self._walk(root, self._keys(tokens, most))
        pages: list[int] = []
        while node.parent is not None:
            pages[:0] = node.pages
            node = node.parent
        assert len(pages) == matched, "the path is what was matched"
        self._pool.hold(pages)
        return pages

    def matched(self, salt: str, tokens: Sequence[int], most: int) -> int:
        """How many pages ``match`` would find; nothing is held, split or counted as used."""
        node, size, found = self._roots.get(salt), self._page_size, 0
        most = min(len(tokens) // size, most)
        while node is not None and found < most:
            node = node.children.get(tuple(tokens[found * size : (found + 1) * size]))
            for key in node.keys if node is not None else ():
                if found == most or tuple(tokens[found * size : (found + 1) * size]) != key:
                    return found
                found += 1
        return found

    def insert(self, salt: str, tokens: Sequence[int], pages: list[int]) -> list[int]:
        """Cache ``pages``, the K and V of all whole pages of ``tokens``.

        The caller holds ``pages``. Returns the pages it holds afterwards: where the tree already had a
        page of the same prefix, that one (now held) in place of the caller's own (released).
        """
        keys = self._keys(tokens, len(pages))
        assert len(keys) == len(pages), "whole pages only"
        if not keys:
            return []  # and no root for a salt that nothing is cached under
        node, matched = self._walk(self._roots.setdefault(salt, _Node(None, salt=salt)), keys)
        kept: list[int] = []
        path = node
        while path.parent is not None:
            kept[:0] = path.pages
            path = path.parent
        for mine, theirs in zip(pages[:matched], kept, strict=True):
            if mine != theirs:
                self._pool.hold([theirs])
                self._pool.release([mine])
        if matched < len(keys):
            child = _Node(node, keys[matched:], pages[matched:], used=self._clock)
            node.children[child.keys[0]] = child
            for page in child.pages:
                self._pool.cache(page)
        return kept + pages[matched:]

    def forget(self, salt: str, tokens: Sequence[int]) -> None:
        """Take out every page that begins as ``tokens`` do, and all that goes on from there; who holds one
        keeps it."""
        root, key = self._roots.get(salt), tuple(tokens[: self._page_size])
        if root is None or key not in root.children:
            return
        top = root.children[key]
        self._detach(root, key)
        for node in self._below(top):
            for page in node.pages:
                self._pool.uncache(page)

    def evict(self, count: int) -> int:
        """Free ``count`` idle pages, or all where there are fewer; how many were freed."""
        if not self._pool.idle:
            return 0
        heap = [(node.used, index, node) for index, node in enumerate(self._leaves()) if self._is_idle(node)]
        heapq.heapify(heap)
        freed, serial = 0, len(heap)
        while heap and freed < count:
            _, _, node = heapq.heappop(heap)
            first = node.keys[0]
            # From the end of the edge: its first pages are shared by more and stay longer.
            while node.pages and freed < count and self._pool.is_idle(node.pages[-1]):
                self._pool.uncache(node.pages.pop())
                node.keys.pop()
                freed += 1
            parent = node.parent
            if node.pages or parent is None:
                continue
            self._detach(parent, first)
            if parent.parent is not None and not parent.children and self._is_idle(parent):
                heapq.heappush(heap, (parent.used, serial, parent))
                serial += 1
        return freed

    def pages(self) -> list[int]:
        """Every page in the tree."""
        return [page for node in self._nodes() for page in node.pages]

    def _keys(self, tokens: Sequence[int], most: int) -> list[PageTokens]:
        size = self._page_size
        count = min(len(tokens) // size, most)
        return [tuple(tokens[i * size : (i + 1) * size]) for i in range(count)]

    def _walk(self, root: _Node, keys: list[PageTokens]) -> tuple[_Node, int]:
        """The node where the longest equal path ends, split there if need be, and its length in pages."""
        self._clock += 1
        node, matched = root, 0
        while matched < len(keys):
            child = node.children.get(keys[matched])
            if child is None:
                break
            length = 1
            while (
                length < len(child.keys)
                and matched + length < len(keys)
                and child.keys[length] == keys[matched + length]
            ):
                length += 1
            if length < len(child.keys):
                child = self._split(node, child, length)
            child.used = self._clock
            matched += length
            node = child
        return node, matched

    def _split(self, parent: _Node, child: _Node, length: int) -> _Node:
        """Cut the edge into ``child`` after ``length`` pages; the new upper node."""
        upper = _Node(parent, child.keys[:length], child.pages[:length], used=child.used)
        parent.children[upper.keys[0]] = upper
        child.parent, child.keys, child.pages = upper, child.keys[length:], child.pages[length:]
        upper.children[child.keys[0]] = child
        return upper

    def _is_idle(self, node: _Node) -> bool:
        """Whether its last page can go: who uses a page uses all before it too."""
        return bool(node.pages) and self._pool.is_idle(node.pages[-1])

    def _detach(self, parent: _Node, key: PageTokens) -> None:
        """Take out a child, and a root that has none left."""
        del parent.children[key]
        if parent.parent is None and not parent.children:
            del self._roots[parent.salt]

    def _nodes(self) -> Iterator[_Node]:
        for root in self._roots.values():
            for top in root.children.values():
                yield from self._below(top)

    def _below(self, top: _Node) -> Iterator[_Node]:
        """The node, and all nodes under it."""
        stack = [top]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node

    def _leaves(self) -> Iterator[_Node]:
        return (node for node in self._nodes() if not node.children)
