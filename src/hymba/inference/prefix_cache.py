"""What earlier texts left behind, found by their tokens: a tree of prefixes with snapshots at some of its nodes.

The state of a hybrid model cannot be cropped, so a prompt can start from a snapshot only where one was taken. They are
taken where prompts and turns end, every so often within a long prompt, and where a new prompt leaves an earlier one:
there others will leave it too (Marconi, arXiv 2411.19379; the tree is RadixAttention's, arXiv 2312.07104).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hymba.model.rows import Snapshot

Tokens = NDArray[np.int32]


class _Node:
    """Where the edge `tokens` leads from its parent; `end` tokens lie on the way from the root."""

    def __init__(self, tokens: Tokens, parent: _Node | None, end: int) -> None:
        self.tokens, self.parent, self.end = tokens, parent, end
        self.children: dict[int, _Node] = {}
        self.snapshot: Snapshot | None = None
        self.used = 0


class PrefixCache:
    """Snapshots of at most `limit` bytes together; the least recently used go first.

    nbytes, entries: of the snapshots held. queries, hits: how often :meth:`find` was asked, and found something.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = self.entries = self.queries = self.hits = 0
        self._root = _Node(np.empty(0, np.int32), None, 0)
        self._clock = 0

    def find(self, ids: Sequence[int], block: int = 1) -> tuple[Snapshot | None, int]:
        """Return the longest snapshot that a prompt can start from, and how far it follows texts seen before.

        A snapshot of the whole prompt serves only if it holds the next token's logits, one of a part of it only if its
        length is a multiple of `block`.
        """
        self.queries += 1
        best: _Node | None = None
        shared = 0
        for node, matched in self._walk(np.asarray(ids, np.int32)):
            shared = node.end - len(node.tokens) + matched
            if matched == len(node.tokens) and _serves(node.snapshot, len(ids), block):
                best = node
        if best is None:
            return None, shared
        self.hits += 1
        self._touch(best)
        return best.snapshot, shared

    def has(self, ids: Sequence[int]) -> bool:
        """Return whether there is a snapshot of exactly these tokens."""
        return any(
            node.end == len(ids) and matched == len(node.tokens) and node.snapshot is not None
            for node, matched in self._walk(np.asarray(ids, np.int32))
        )

    def add(self, ids: Sequence[int], snapshot: Snapshot) -> None:
        """Keep the snapshot of a text; one that is larger than the whole limit is dropped."""
        if snapshot.nbytes > self.limit:
            return
        node = self._place(np.asarray(ids, np.int32))
        if node.snapshot is not None:
            self._drop(node)
        node.snapshot = snapshot
        self.nbytes += snapshot.nbytes
        self.entries += 1
        self._touch(node)
        while self.nbytes > self.limit:
            self._evict()

    def clear(self) -> None:
        """Forget everything but the counts of queries and hits."""
        self._root = _Node(np.empty(0, np.int32), None, 0)
        self.nbytes = self.entries = 0

    def _walk(self, ids: Tokens) -> Iterator[tuple[_Node, int]]:
        """Yield the nodes on the way of `ids`, each with how many tokens of its edge agree; the last may be partial."""
        node, at = self._root, 0
        while at < len(ids) and (child := node.children.get(int(ids[at]))) is not None:
            matched = _common(child.tokens, ids[at:])
            yield child, matched
            if matched < len(child.tokens):
                return
            node, at = child, at + matched

    def _place(self, ids: Tokens) -> _Node:
        """Return the node of exactly these tokens, made if need be."""
        node = self._root
        for child, matched in self._walk(ids):
            node = child if matched == len(child.tokens) else self._split(child, matched)
        if node.end < len(ids):
            leaf = _Node(ids[node.end :].copy(), node, len(ids))
            node.children[int(leaf.tokens[0])] = leaf
            node = leaf
        return node

    def _split(self, node: _Node, at: int) -> _Node:
        """Put a node on the edge that leads to `node`, `at` tokens along it."""
        parent = node.parent
        assert parent is not None
        middle = _Node(node.tokens[:at], parent, node.end - len(node.tokens) + at)
        parent.children[int(middle.tokens[0])] = middle
        node.tokens, node.parent = node.tokens[at:], middle
        middle.children[int(node.tokens[0])] = node
        return middle

    def _touch(self, node: _Node) -> None:
        self._clock += 1
        node.used = self._clock

    def _evict(self) -> None:
        oldest = min((node for node in self._nodes() if node.snapshot is not None), key=lambda node: node.used)
        self._drop(oldest)
        while oldest.parent is not None and not oldest.children and oldest.snapshot is None:
            del oldest.parent.children[int(oldest.tokens[0])]
            oldest = oldest.parent

    def _drop(self, node: _Node) -> None:
        assert node.snapshot is not None
        self.nbytes -= node.snapshot.nbytes
        self.entries -= 1
        node.snapshot = None

    def _nodes(self) -> Iterator[_Node]:
        left = [self._root]
        while left:
            node = left.pop()
            yield node
            left.extend(node.children.values())


def _serves(snapshot: Snapshot | None, prompt: int, block: int) -> bool:
    if snapshot is None:
        return False
    return snapshot.tokens % block == 0 if snapshot.tokens < prompt else snapshot.logits is not None


def _common(a: Tokens, b: Tokens) -> int:
    """Return how many tokens two texts begin with in common."""
    count = min(len(a), len(b))
    differ = np.flatnonzero(a[:count] != b[:count])
    return int(differ[0]) if len(differ) else count
