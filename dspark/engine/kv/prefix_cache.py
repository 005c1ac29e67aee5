"""Prefix cache: full pages, found again by their tokens and all tokens before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_ROOT = -1  # the parent of first pages

# Tokens are compared one by one where hashes agree, so a page is never taken for another's. The
# parent's number stands for everything before: it cannot change while the child is findable.
_Key = tuple[int, tuple[int, ...]]


@dataclass(slots=True)
class _Node:
    """A findable page: its place in the index, and the pages right behind it."""

    key: _Key
    depth: int
    children: set[int] = field(default_factory=set)

    @property
    def parent(self) -> int:
        return self.key[0]


class PrefixTree:
    """Findable pages, each behind the page of the tokens before it.

    Args:
        page_size: tokens per page.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._nodes: dict[int, _Node] = {}
        self._index: dict[_Key, int] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._nodes

    def find(self, tokens: Sequence[int], most: int) -> list[int]:
        """The pages of the longest findable prefix, `most` at most."""
        found: list[int] = []
        size, parent = self.page_size, _ROOT
        for begin in range(0, most * size, size):
            page = self._index.get((parent, tuple(tokens[begin : begin + size])))
            if page is None:
                break
            found.append(page)
            parent = page
        return found

    def add(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Make the full pages of `tokens` findable; where an equal page is, that one stays.

        Raises:
            ValueError: a page is findable already, by other tokens.
        """
        size, parent = self.page_size, _ROOT
        for depth, page in enumerate(pages[: len(tokens) // size]):
            key = (parent, tuple(tokens[depth * size : (depth + 1) * size]))
            there = self._index.get(key)
            if there is None:
                if page in self._nodes:
                    raise ValueError(f"Page {page} is findable already, by other tokens.")
                self._nodes[page] = _Node(key, depth)
                self._index[key] = page
                if parent != _ROOT:
                    self._nodes[parent].children.add(page)
                there = page
            parent = there

    def parent(self, page: int) -> int:
        """The page before a findable page; -1 for a first one."""
        return self._nodes[page].parent

    def cut(self, page: int) -> list[int]:
        """Make a page and all behind it unfindable; which these are, the page first."""
        parent = self._nodes[page].parent
        if parent != _ROOT:
            self._nodes[parent].children.remove(page)
        gone = [page]
        for each in gone:  # grows as it goes
            node = self._nodes.pop(each)
            del self._index[node.key]
            gone.extend(node.children)
        return gone

    def clear(self) -> None:
        """Make every page unfindable."""
        self._nodes.clear()
        self._index.clear()

    def with_ancestors(self, pages: Sequence[int]) -> list[int]:
        """Findable pages among `pages` and all before them, deepest first."""
        depths: dict[int, int] = {}
        for page in reversed(pages):
            each = page
            while each not in depths and each in self._nodes:
                node = self._nodes[each]
                depths[each] = node.depth
                each = node.parent
        return sorted(depths, key=depths.__getitem__, reverse=True)

    def faults(self) -> list[str]:
        """What is inconsistent, one sentence each; linear in the findable pages."""
        found = []
        for page, node in self._nodes.items():
            parent = self._nodes.get(node.parent)
            if self._index.get(node.key) != page:
                found.append(f"page {page} is in the tree but not in its index")
            if len(node.key[1]) != self.page_size:
                found.append(f"page {page} is findable with {len(node.key[1])} tokens")
            if node.parent != _ROOT and parent is None:
                found.append(f"page {page} is findable behind page {node.parent}, which is not")
            elif parent is not None and page not in parent.children:
                found.append(f"page {page} is not among those behind page {node.parent}")
            if node.depth != (0 if parent is None else parent.depth + 1):
                found.append(f"page {page} has depth {node.depth}, which is wrong")
            for child in node.children:
                if child not in self._nodes or self._nodes[child].parent != page:
                    found.append(f"page {child} is wrongly said to be behind page {page}")
        if len(self._index) != len(self._nodes):
            found.append(f"{len(self._index)} keys find {len(self._nodes)} pages")
        return found
