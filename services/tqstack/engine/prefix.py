"""The tree of prefixes: which earlier tokens a prompt begins with, and where it can go on from.

A node is a run of tokens behind its parent's; it may carry a checkpoint of a sequence at its end. A
prompt goes on from the deepest checkpoint whose tokens it begins with. Pure: what a checkpoint is,
and what it weighs, others know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Tokens of paths whose checkpoints were evicted, which tell why a prefix was missed.
REMEMBERED = 4_000_000

Tokens = Sequence[int] | np.ndarray


@dataclass(eq=False)
class Node:
    """
    Attributes:
        tokens: int32, of the run from the parent's end to this node's.
        end: position behind its last token.
        checkpoint: what others store here; None: nothing.
        inflation: the tree's value of the least useful one when this was last used.
        evicted: there was a checkpoint here.
    """

    tokens: np.ndarray
    end: int
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    checkpoint: Any = None
    inflation: float = 0.0
    evicted: bool = False

    @property
    def behind(self) -> int:
        """Tokens that going on from here saves, beside the checkpoint before it."""
        node = self.parent
        while node is not None and node.checkpoint is None:
            node = node.parent
        return self.end - (node.end if node is not None else 0)


@dataclass(frozen=True)
class Match:
    """
    Attributes:
        known: tokens that the prompt shares with some earlier one.
        node: the deepest with a checkpoint on that way; None: there is none.
        evicted: whether a deeper one was evicted.
    """

    known: int
    node: Node | None
    evicted: bool

    @property
    def usable(self) -> int:
        """Tokens that need not be read again."""
        return self.node.end if self.node else 0


class PrefixTree:
    """
    Args:
        nbytes: bytes that evicting a checkpoint would give back.
    """

    def __init__(self, nbytes: Callable[[Any], int]):
        self._nbytes = nbytes
        self._root = Node(np.zeros(0, np.int32), 0, None)
        self._inflation = 0.0
        self._tokens = 0

    def match(self, tokens: Tokens, most: int | None = None) -> Match:
        """
        Args:
            most: go on from no later position than this.
        """
        tokens = np.asarray(tokens, dtype=np.int32)
        most = len(tokens) if most is None else most
        node, best, at, evicted = self._root, None, 0, False
        while True:
            child = node.children.get(int(tokens[at])) if at < len(tokens) else None
            if child is None:
                return Match(at, best, evicted)
            shared = _shared(child.tokens, tokens[at:])
            at += shared
            if shared < len(child.tokens):
                return Match(at, best, evicted)
            node = child
            if node.end <= most and node.checkpoint is not None:
                best, evicted = node, False
            elif node.end <= most and node.evicted:
                evicted = True

    def path(self, node: Node) -> np.ndarray:
        """All tokens up to a node's end."""
        runs: list[np.ndarray] = []
        at: Node | None = node
        while at is not None:
            runs.insert(0, at.tokens)
            at = at.parent
        return np.concatenate(runs)

    def touch(self, node: Node) -> None:
        """A checkpoint was used."""
        node.inflation = self._inflation

    def insert(self, tokens: Tokens, checkpoint: Any) -> Node:
        """Keep a checkpoint at the end of these tokens, in place of one that may be there."""
        tokens = np.asarray(tokens, dtype=np.int32)
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                child = Node(tokens[at:].copy(), len(tokens), node)
                node.children[int(tokens[at])] = child
                self._tokens += len(child.tokens)
            else:
                shared = _shared(child.tokens, tokens[at:])
                if shared < len(child.tokens):
                    child = self._split(child, shared)
            at, node = child.end, child
        node.checkpoint, node.evicted = checkpoint, False
        self.touch(node)
        self._forget()
        return node

    def _split(self, child: Node, at: int) -> Node:
        """A node in the middle of another one's run."""
        parent = child.parent
        assert parent is not None
        middle = Node(child.tokens[:at], child.end - len(child.tokens) + at, parent)
        parent.children[int(middle.tokens[0])] = middle
        child.tokens, child.parent = child.tokens[at:], middle
        middle.children[int(child.tokens[0])] = child
        return middle

    def checkpoints(self) -> Iterator[Node]:
        return (node for node in self._nodes() if node.checkpoint is not None)

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def value(self, node: Node) -> float:
        """How useful a checkpoint is: tokens saved per byte, and how lately it was (GDSF: what was
        evicted raises the bar for what comes, so that unused ones age)."""
        return node.inflation + node.behind / max(1, self._nbytes(node.checkpoint))

    def least_useful(self, kept: set[Node]) -> Node | None:
        """The checkpoint to evict first, none of `kept`."""
        return min((n for n in self.checkpoints() if n not in kept), key=self.value, default=None)

    def evict(self, node: Node) -> Any:
        """Returns the checkpoint, which is no longer in the tree."""
        self._inflation = max(self._inflation, self.value(node))
        checkpoint, node.checkpoint, node.evicted = node.checkpoint, None, True
        self._forget()
        return checkpoint

    def _forget(self) -> None:
        """Drop ways that lead to nothing, once too many tokens are remembered."""
        if self._tokens <= REMEMBERED:
            return
        leaves = [n for n in self._nodes() if not n.children and n.checkpoint is None]
        for leaf in sorted(leaves, key=lambda node: node.inflation):
            node: Node = leaf
            while node.parent is not None and not node.children and node.checkpoint is None:
                del node.parent.children[int(node.tokens[0])]
                self._tokens -= len(node.tokens)
                node = node.parent
            if self._tokens <= REMEMBERED // 2:
                return


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two runs begin with in common."""
    count = min(len(a), len(b))
    differ = np.flatnonzero(a[:count] != b[:count])
    return int(differ[0]) if len(differ) else count
