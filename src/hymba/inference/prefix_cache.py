"""The prefix cache: a radix tree over token ids with snapshots of cache rows at some of its nodes.

The state of a hybrid model cannot be cropped, so a prompt can start only where a snapshot was taken: at the end of a
prompt or an answer, at intervals within a long prompt, and where a new prompt parts from an earlier one, since others
are likely to share the same prefix (Marconi, arXiv 2411.19379; the tree is RadixAttention's, arXiv 2312.07104).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hymba.model.rows import Snapshot

Tokens = NDArray[np.int32]


class _Node:
    """The end of the edge `tokens` from its parent; the whole path from the root is `end` tokens long.

    Every node but the root holds a snapshot or has two children or more.
    """

    def __init__(self, tokens: Tokens, parent: _Node | None, end: int) -> None:
        self.tokens, self.parent, self.end = tokens, parent, end
        self.children: dict[int, _Node] = {}
        self.snapshot: Snapshot | None = None
        self.used = 0


class PrefixCache:
    """Snapshots of at most `limit` bytes in total; the least recently used are dropped first.

    nbytes, entries: of the snapshots held. queries, hits: calls of :meth:`find`, and those that returned a snapshot.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = self.entries = self.queries = self.hits = 0
        self._root = _Node(np.empty(0, np.int32), None, 0)
        self._clock = 0

    def find(self, ids: Sequence[int], block: int = 1) -> tuple[Snapshot | None, int]:
        """Return the longest snapshot that a prompt can start from, or None, and the length of the longest prefix that
        it shares with a text whose snapshot is held.

        A snapshot of the whole prompt serves only if it holds the next token's logits, one of a part of it only if its
        length is a multiple of `block`.
        """
        self.queries += 1
        best: _Node | None = None
        shared = 0
        for node, matched in self._path(np.asarray(ids, np.int32)):
            shared = node.end - len(node.tokens) + matched
            if matched == len(node.tokens) and _serves(node.snapshot, len(ids), block):
                best = node
        if best is None:
            return None, shared
        self.hits += 1
        self._touch(best)
        return best.snapshot, shared

    def has(self, ids: Sequence[int], with_logits: bool = False) -> bool:
        """Return whether there is a snapshot of exactly these tokens, one that holds logits if `with_logits`."""
        node, matched = self._path(np.asarray(ids, np.int32))[-1]
        if node.end != len(ids) or matched < len(node.tokens) or node.snapshot is None:
            return False
        return not with_logits or node.snapshot.logits is not None

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
        """Drop all snapshots; the counts of queries and hits stay."""
        self._root = _Node(np.empty(0, np.int32), None, 0)
        self.nbytes = self.entries = 0

    def _path(self, ids: Tokens) -> list[tuple[_Node, int]]:
        """Return the nodes that `ids` leads to, the root first, each with how many tokens of its edge agree.

        Only the last node may agree in part. The path is complete before anything is changed, so a caller may split or
        remove its nodes.
        """
        node, at = self._root, 0
        path = [(node, 0)]
        while at < len(ids) and (child := node.children.get(int(ids[at]))) is not None:
            matched = _common(child.tokens, ids[at:])
            path.append((child, matched))
            if matched < len(child.tokens):
                break
            node, at = child, at + matched
        return path

    def _place(self, ids: Tokens) -> _Node:
        """Return the node of exactly these tokens, made if need be."""
        node, matched = self._path(ids)[-1]
        if matched < len(node.tokens):
            node = self._split(node, matched)
        if node.end < len(ids):
            leaf = _Node(ids[node.end :].copy(), node, len(ids))
            node.children[int(leaf.tokens[0])] = leaf
            node = leaf
        return node

    def _split(self, node: _Node, at: int) -> _Node:
        """Insert a node into the edge that leads to `node`, `at` tokens along it, and return it."""
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
        """Drop the least recently used snapshot, and the nodes that no other snapshot needs."""
        node = min((node for node in self._nodes() if node.snapshot is not None), key=lambda node: node.used)
        self._drop(node)
        while node.parent is not None and node.snapshot is None and not node.children:
            del node.parent.children[int(node.tokens[0])]
            node = node.parent
        if node.parent is not None and node.snapshot is None and len(node.children) == 1:
            self._join(node, node.parent)

    def _join(self, node: _Node, parent: _Node) -> None:
        """Replace `node`, which has one child and no snapshot, by an edge from `parent` to that child."""
        (child,) = node.children.values()
        child.tokens, child.parent = np.concatenate((node.tokens, child.tokens)), parent
        parent.children[int(child.tokens[0])] = child

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
    """Return the length of the common prefix of two texts."""
    count = min(len(a), len(b))
    differ = np.flatnonzero(a[:count] != b[:count])
    return int(differ[0]) if len(differ) else count
