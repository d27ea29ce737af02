"""The tree of prefixes beside a plain list of token runs, and what it lets go of first."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqstack.engine import prefix
from tqstack.engine.prefix import PrefixTree

Path = tuple[int, ...]


@contextmanager
def remembering(tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "REMEMBERED", tokens)
        yield


def shared_with(paths, tokens: Path) -> int:
    """The longest beginning in common with any of these."""
    starts = {path[:n] for path in paths for n in range(len(path) + 1)}
    return max((n for n in range(len(tokens) + 1) if tokens[:n] in starts), default=0)


@dataclass
class Naive:
    """What the tree must do. A checkpoint is its weight in bytes."""

    paths: set[Path] = field(default_factory=set)  # all that ever came
    weights: dict[Path, int] = field(default_factory=dict)  # of checkpoints
    evicted: set[Path] = field(default_factory=set)
    used: dict[Path, float] = field(default_factory=dict)  # the bar when they were used
    bar: float = 0.0

    def insert(self, tokens: Path, weight: int) -> None:
        self.paths.add(tokens)
        self.weights[tokens], self.used[tokens] = weight, self.bar
        self.evicted.discard(tokens)

    def match(self, tokens: Path, most: int) -> tuple[int, int, bool]:
        """(known, usable, evicted)"""
        starts = [tokens[:n] for n in range(1, min(most, len(tokens)) + 1)]
        usable = max((len(s) for s in starts if s in self.weights), default=0)
        evicted = any(s in self.evicted for s in starts[usable:])
        return shared_with(self.paths, tokens), usable, evicted

    def value(self, tokens: Path) -> float:
        before = [len(p) for p in self.weights if p != tokens and tokens[: len(p)] == p]
        saved = len(tokens) - max(before, default=0)
        return self.used[tokens] + saved / max(1, self.weights[tokens])

    def evict(self, tokens: Path) -> None:
        self.bar = max(self.bar, self.value(tokens))
        del self.weights[tokens]
        self.evicted.add(tokens)


def path_of(tree, node) -> Path:
    return tuple(tree.path(node).tolist())


runs = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)
actions = st.one_of(
    st.tuples(st.just("insert"), runs, st.integers(0, 4)),
    st.tuples(st.just("match"), runs, st.integers(0, 12)),
    st.tuples(st.just("evict"), st.integers(0, 9)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(actions, max_size=30))
def test_the_tree_does_what_a_list_of_token_runs_does(script):
    tree, naive = PrefixTree(lambda weight: weight), Naive()
    nodes = {}
    for name, *arguments in script:
        if name == "insert":
            tokens, weight = arguments
            naive.insert(tokens, weight)
            nodes[tokens] = tree.insert(tokens, weight)
        elif name == "match":
            tokens, most = arguments
            match = tree.match(tokens, most)
            assert (match.known, match.usable, match.evicted) == naive.match(tokens, most)
            if match.node:
                tree.touch(match.node)
                naive.used[path_of(tree, match.node)] = naive.bar
        else:
            kept = {nodes[path] for path in sorted(naive.weights)[: arguments[0]]}
            free = [path for path in naive.weights if nodes[path] not in kept]
            node = tree.least_useful(kept)
            assert (node is None) == (not free)
            if node is not None:
                path = path_of(tree, node)
                assert path in free
                assert naive.value(path) == tree.value(node) == min(map(naive.value, free))
                naive.evict(path)
                assert tree.evict(node) is not None and node.checkpoint is None
        assert {path_of(tree, n): n.checkpoint for n in tree.checkpoints()} == naive.weights
    for path, node in nodes.items():  # the same nodes, however often their runs were split
        assert path_of(tree, node) == path and node.end == len(path)


@settings(max_examples=200, deadline=None)
@given(st.lists(actions, max_size=40), st.integers(0, 20))
def test_few_tokens_of_evicted_ways_are_remembered_and_checkpoints_stay(script, remembered):
    tree, naive = PrefixTree(lambda weight: weight), Naive()
    with remembering(remembered):
        for name, *arguments in script:
            if name == "insert":
                naive.insert(*arguments)
                tree.insert(*arguments)
            elif name == "match":
                tokens, most = arguments
                match = tree.match(tokens, most)
                known, usable, evicted = naive.match(tokens, most)
                assert match.usable == usable and match.evicted <= evicted
                assert shared_with(naive.weights, tokens) <= match.known <= known
            elif node := tree.least_useful(set()):
                naive.evict(path_of(tree, node))
                tree.evict(node)
            held = sum(len(node.tokens) for node in tree._nodes())
            ways = {p[:n] for p in naive.weights for n in range(1, len(p) + 1)}
            assert held == tree._tokens <= max(remembered, len(ways))
            assert {path_of(tree, n) for n in tree.checkpoints()} == set(naive.weights)


def test_ways_that_were_unused_for_longest_are_forgotten_first():
    tree = PrefixTree(lambda weight: weight)
    with remembering(20):
        for first in range(6):
            tree.evict(tree.insert([first] * 4, 1))  # 4, 8, 12, 16, 20, 24: down to 10
        assert [tree.match([first] * 4).known for first in range(6)] == [0, 0, 0, 0, 4, 4]


def test_a_prompt_goes_on_before_its_last_token_only():
    tree = PrefixTree(lambda weight: weight)
    tree.insert([1, 2, 3], 1)
    node = tree.insert([1, 2, 3, 4], 1)
    assert tree.match([1, 2, 3, 4], most=3).usable == 3
    assert tree.match([1, 2, 3, 4]).node is node
    assert tree.match([1, 2, 3, 4, 5], most=4).node is node


def test_a_prompt_that_leaves_an_earlier_one_in_a_run_knows_where():
    tree = PrefixTree(lambda weight: weight)
    tree.insert(range(100), 1)
    match = tree.match([*range(60), 7, 7])
    assert (match.known, match.node, match.usable, match.evicted) == (60, None, 0, False)
    branch = tree.insert(range(60), 1)
    assert tree.match([*range(60), 7, 7]).node is branch
    assert tree.match(range(100)).usable == 100


def test_a_miss_tells_whether_it_was_evicted_until_it_is_there_again():
    tree = PrefixTree(lambda weight: weight)
    tree.insert(range(10), 1)
    tree.evict(tree.insert(range(20), 1))
    assert tree.match(range(30)).evicted and tree.match(range(30)).usable == 10
    assert not tree.match(range(19)).evicted and not tree.match(range(30), most=19).evicted
    tree.insert(range(25), 1)
    assert not tree.match(range(30)).evicted  # a deeper one is there
    assert tree.match(range(24)).evicted
    tree.insert(range(20), 1)
    assert not tree.match(range(24)).evicted


def test_a_checkpoint_counts_the_tokens_behind_the_one_before_it():
    tree = PrefixTree(lambda weight: weight)
    system, turn = tree.insert(range(1_000), 10), tree.insert(range(1_100), 10)
    other = tree.insert([*range(1_000), *[7] * 300], 10)
    assert [node.behind for node in (system, turn, other)] == [1_000, 100, 300]
    assert tree.least_useful(set()) is turn
    assert tree.least_useful({turn}) is other
    tree.evict(system)
    assert (turn.behind, other.behind) == (1_100, 1_300)


def test_a_heavy_checkpoint_goes_before_a_light_one_that_saves_as_much():
    tree = PrefixTree(lambda weight: weight)
    light, heavy = tree.insert([1] * 50, 10), tree.insert([2] * 50, 1_000)
    assert tree.least_useful(set()) is heavy and tree.least_useful({heavy}) is light
    assert tree.least_useful({light, heavy}) is None


def test_what_is_used_outlives_what_saves_more_and_is_never_used():
    tree = PrefixTree(lambda weight: weight)
    unused, used = tree.insert([0] * 300, 1), tree.insert([1] * 100, 1)
    for other in range(2, 9):  # passers-by, each evicted in its turn
        tree.touch(used)
        tree.insert([other] * 80, 1)
        node = tree.least_useful(set())
        assert node is not None and node is not used
        tree.evict(node)
    assert unused.checkpoint is None and used.checkpoint is not None


def test_tokens_are_the_same_as_lists_and_as_arrays_and_are_the_trees_own():
    tree, tokens = PrefixTree(lambda weight: weight), np.arange(50, dtype=np.int32)
    node = tree.insert(tokens, 1)
    tokens[:] = 0
    assert tree.path(node).tolist() == list(range(50))
    assert tree.match(list(range(50))).node is tree.match(np.arange(50)).node is node
