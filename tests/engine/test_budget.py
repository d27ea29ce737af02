"""The budget beside a real pool: nothing is promised that there is no room for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tqstack.attention.blocks import BlockLayout
from tqstack.attention.pool import Pool
from tqstack.attention.table import Table
from tqstack.engine.budget import KV_STEP, SMALLEST_CHUNK, Budget, Costs, Wish
from tqstack.engine.prefix import Node
from tqstack.engine.store import PrefixStore
from tqstack.turboquant.codec import make_codec

BLOCK, CHUNK = 16, 512
LAYOUT = BlockLayout(make_codec("tq4", 8), make_codec("tq4", 8), 1, BLOCK)
BYTES = LAYOUT.nbytes  # of a block
WEIGHTS, FIXED = 10_000, 3_000


def workspace(chunk: int) -> int:
    return 20 * chunk


def costs(limit: int, **changes) -> Costs:
    """Bytes for a pool; of a cache without one: costs(limit, block=0, token=...)."""
    defaults = {"fixed": FIXED, "block": BYTES, "token": 0, "exact": BLOCK, "block_tokens": BLOCK}
    return Costs(limit=limit, weights=WEIGHTS, workspace=workspace, **{**defaults, **changes})


def room(blocks: int, jobs: int = 1, chunk: int = CHUNK) -> int:
    """Bytes of so many jobs that need so many blocks in all."""
    return WEIGHTS + workspace(chunk) + jobs * FIXED + blocks * BYTES


@dataclass(eq=False)
class Kept:
    """A checkpoint: blocks, and states that are not really there."""

    table: Table | None
    state_bytes: int
    on_disk: bool = False

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.table.ids if self.table else ()


@dataclass(eq=False, repr=False)
class Sequence:
    tokens: list[int]  # at its longest
    table: Table | None
    at: int  # tokens that it holds


@dataclass(eq=False)
class World:
    """A pool, its prefixes and its jobs, each of which is a run of one token."""

    costs: Costs
    prefixes: int = 1 << 40
    jobs: dict[int, Sequence] = field(default_factory=dict)
    in_flight: int = 0

    def __post_init__(self) -> None:
        self.pool = Pool(1, block_tokens=BLOCK) if self.costs.block else None
        if self.pool:
            self.pool.declare(0, LAYOUT)
        self.store = PrefixStore(self.pool, self.prefixes)
        self.budget = Budget(
            self.costs, CHUNK, self.pool, self.store, self._held, lambda: self.in_flight
        )
        self.numbers = 0

    def _held(self, job: int) -> int:
        table = self.jobs[job].table if job in self.jobs else None
        return len(table.ids) if table else 0

    def admit(self, token: int, tokens: int, kept: int = 0) -> int:
        """Tokens of its chunk; 0: it has to wait."""
        wanted = [token] * tokens
        node = self.store.match(wanted).node
        keep = {*self._first(kept), *([node] if node else [])}
        before = set(self.store.nodes())
        number, self.numbers = self.numbers, self.numbers + 1
        chunk = self.budget.admit(number, Wish(tokens, node), keep)
        assert keep <= set(self.store.nodes()) <= before
        if chunk:
            table = Table(self.pool, node.checkpoint.blocks if node else ()) if self.pool else None
            self.jobs[number] = Sequence(wanted, table, node.end if node else 0)
        elif self.pool is None:
            assert set(self.store.nodes()) == before, "prefixes were evicted in vain"
        return chunk

    def _first(self, count: int) -> list[Node]:
        return sorted(self.store.nodes(), key=lambda node: (node.end, int(node.tokens[0])))[:count]

    def read(self, job: int, count: int) -> None:
        """More tokens, as many as were promised at most: there is always room for them."""
        one = self.jobs[job]
        one.at = min(one.at + count, len(one.tokens))
        if one.table:
            one.table.reserve(self.costs.blocks(one.at))

    def keep(self, job: int, state: int, kept: int = 0) -> bool:
        """Make a checkpoint. False: there is no room for it."""
        one, keep = self.jobs[job], set(self._first(kept))
        tokens = one.tokens[: one.at]
        if not tokens or self.store.has(tokens):
            return False
        done = self.budget.room_for(state, keep)
        if done:
            table = Table(self.pool, one.table.ids) if self.pool and one.table else None
            checkpoint: Any = Kept(table, state)
            self.store.insert(tokens, checkpoint, keep)
        assert keep <= set(self.store.nodes())
        return done

    def serve(self, token: int, tokens: int, state: int = FIXED) -> bool:
        """A job from beginning to end, and its checkpoint. False: it has to wait."""
        if not self.admit(token, tokens):
            return False
        job = max(self.jobs)
        self.read(job, tokens)
        self.keep(job, state)
        self.end(job)
        return True

    def end(self, job: int) -> None:
        del self.jobs[job]
        self.budget.release(job)

    def check(self) -> None:
        budget, pool, store = self.budget, self.pool, self.store
        assert budget.committed <= budget.limit
        states = len(self.jobs) * self.costs.fixed + store.state_bytes
        longest = max((len(one.tokens) for one in self.jobs.values()), default=0)
        plain = len(self.jobs) * longest * self.costs.token
        held = WEIGHTS + states + plain + budget.workspace() + (pool.nbytes if pool else 0)
        assert held <= budget.limit
        if pool:
            pool.check_integrity()
            assert pool.blocks_free >= sum(
                max(0, self.costs.blocks(len(one.tokens)) - len(one.table.ids if one.table else ()))
                for one in self.jobs.values()
            )


actions = st.one_of(
    st.tuples(st.just("admit"), st.integers(0, 3), st.integers(1, 900), st.integers(0, 3)),
    st.tuples(st.just("serve"), st.integers(0, 3), st.integers(1, 900), st.integers(0, FIXED)),
    st.tuples(st.just("read"), st.integers(0, 9), st.integers(1, 900)),
    st.tuples(st.just("keep"), st.integers(0, 9), st.integers(0, FIXED), st.integers(0, 2)),
    st.tuples(st.just("end"), st.integers(0, 9)),
)
limits = st.builds(room, st.integers(0, 150), st.integers(1, 3), st.sampled_from([64, CHUNK]))
plans = st.builds(costs, limits, exact=st.sampled_from([0, BLOCK, 8 * BLOCK])) | st.builds(
    costs, limits, block=st.just(0), token=st.sampled_from([0, 20])
)


def run(world: World, script) -> None:
    for name, *arguments in script:
        if name not in ("admit", "serve"):
            if not world.jobs:
                continue
            arguments[0] = list(world.jobs)[arguments[0] % len(world.jobs)]
        getattr(world, name)(*arguments)
        world.check()


@settings(max_examples=150, deadline=None)
@given(plans, st.sampled_from([0, 20_000, 1 << 40]), st.lists(actions, min_size=5, max_size=40))
def test_what_is_held_and_promised_never_exceeds_the_limit(plan, prefixes, script):
    world = World(plan, prefixes)
    run(world, script)
    for job in list(world.jobs):  # all that was promised is there
        world.read(job, 1_000)
        world.check()
        world.end(job)
    world.store.clear()
    assert world.budget.committed - WEIGHTS == (world.pool.nbytes if world.pool else 0)
    assert world.pool is None or world.pool.blocks_used == 0


def served(world: World, *jobs: tuple[int, int, int]) -> list[Node]:
    """The checkpoints that jobs (token, tokens, bytes of state) leave."""
    nodes = []
    for token, tokens, state in jobs:
        assert world.serve(token, tokens, state)
        nodes.append(world.store.match([token] * (tokens + 1)).node)
    return nodes


def test_a_promise_holds_room_until_its_job_ends():
    world = World(costs(room(20, jobs=2)))
    assert world.admit(0, 11 * BLOCK) == CHUNK
    assert world.admit(1, 12 * BLOCK) == 0  # one block too many
    assert world.admit(1, 11 * BLOCK) == CHUNK
    assert world.budget.committed == world.budget.limit
    world.end(0)
    assert world.admit(2, 12 * BLOCK) == 0 and world.admit(2, 11 * BLOCK) == CHUNK


def test_chunks_are_halved_before_a_job_has_to_wait():
    for chunk in (CHUNK, 256, 128, SMALLEST_CHUNK):
        for spare in (0, workspace(chunk) - 1):
            world = World(costs(room(10, chunk=chunk) + spare))
            assert world.admit(0, 11 * BLOCK) == min(CHUNK, chunk)
    assert World(costs(room(10, chunk=SMALLEST_CHUNK) - 1)).admit(0, 11 * BLOCK) == 0


def test_steps_take_the_workspace_of_the_largest_chunk_and_not_of_all():
    world = World(costs(room(20, jobs=2)))
    assert world.admit(0, 11 * BLOCK) == world.admit(1, 11 * BLOCK) == CHUNK
    assert world.budget.workspace() == workspace(CHUNK)


def test_prefixes_give_way_the_least_useful_first_and_no_more_than_must():
    world = World(costs(room(0) + 3_500, block=0))
    light, heavy, middle = served(world, (0, 160, 500), (1, 160, 2_000), (2, 160, 1_000))
    assert world.admit(3, 160) == CHUNK and len(world.store) == 3
    assert world.admit(4, 160) == CHUNK and world.store.nodes() == [light]
    assert heavy.evicted and middle.evicted
    assert world.budget.committed == world.budget.limit


def test_kept_prefixes_stay_whatever_comes():
    world = World(costs(room(0, jobs=2), block=0))
    nodes = served(world, (0, 160, 1_000), (1, 170, 2_000))
    assert world.admit(2, 160)
    for kept in (2, 1):
        assert world.admit(3, 160, kept=kept) == 0
        assert set(world.store.nodes()) == set(nodes)
    assert world.admit(3, 160) and not world.store.nodes()


def test_nothing_is_evicted_for_what_would_not_fit_anyway():
    world = World(costs(room(80)))
    nodes = served(world, (0, 160, 1_000), (1, 160, 1_000))
    assert world.admit(2, 40 * BLOCK) and not world.admit(3, 100 * BLOCK)
    assert set(world.store.nodes()) == set(nodes)


def test_a_job_needs_no_room_for_the_blocks_that_it_shares():
    world = World(costs(room(30, chunk=SMALLEST_CHUNK) + 100))
    served(world, (0, 21 * BLOCK, 100))
    assert world.admit(0, 31 * BLOCK) == SMALLEST_CHUNK
    assert len(world.store) == 1 and world.jobs[1].at == 21 * BLOCK
    world.read(1, 1_000)
    world.check()


def test_free_memory_of_the_pool_is_given_back_before_prefixes_are():
    world = World(costs(room(100)))
    (node,) = served(world, (0, 5 * BLOCK, 100))
    assert world.serve(1, 90 * BLOCK, 0)
    assert world.budget.room_for(world.budget.limit - world.budget.committed + 1, {node})
    assert node.checkpoint is not None
    assert world.pool and world.pool.blocks_free < 90


def test_prefixes_give_way_to_a_checkpoint_but_none_that_is_kept():
    world = World(costs(room(0) + 3_000, block=0))
    first, second = served(world, (0, 160, 1_000), (1, 170, 2_000))
    assert world.admit(2, 160) == CHUNK
    assert not world.budget.room_for(1, {first, second})
    assert world.budget.room_for(1_000, {first}) and world.store.nodes() == [first]


def test_there_is_no_room_for_a_checkpoint_where_all_is_promised():
    world = World(costs(room(20, chunk=SMALLEST_CHUNK)))
    assert world.admit(0, 21 * BLOCK)
    world.read(0, 10 * BLOCK)
    assert not world.keep(0, 1) and world.keep(0, 0)
    world.read(0, 11 * BLOCK)
    world.check()


def test_batches_of_plain_caches_are_padded_to_the_longest():
    token = 10
    limit = WEIGHTS + workspace(CHUNK) + 2 * FIXED + 2 * token * (1_000 + KV_STEP)
    world = World(costs(limit, block=0, token=token))
    assert world.admit(0, 1_000) and world.admit(1, 10) == CHUNK
    assert world.budget.committed == limit
    assert World(costs(limit - 1, block=0, token=token)).admit(0, 1_000) == CHUNK


def test_what_is_being_written_takes_room_and_says_nothing_of_what_fits():
    world = World(costs(room(20, chunk=SMALLEST_CHUNK)))
    world.in_flight = 1
    assert world.budget.alone(Wish(21 * BLOCK)) and not world.admit(0, 21 * BLOCK)
    world.in_flight = 0
    assert world.admit(0, 21 * BLOCK)


@given(
    st.integers(0, 200_000),
    st.sampled_from([(0, 7), (BYTES, 0), (0, 0)]),
    st.sampled_from([0, BLOCK, 8 * BLOCK]),
)
def test_the_longest_sequence_is_the_longest_that_fits_alone(limit, kind, exact):
    block, token = kind
    world = World(costs(limit, block=block, token=token, exact=exact))
    longest, fits = world.budget.longest(), world.budget.alone
    assert longest == 0 or fits(Wish(longest))
    assert longest == 1 << 32 or not fits(Wish(longest + 1))


@settings(max_examples=60, deadline=None)
@given(plans, st.lists(actions, max_size=15), st.integers(1, 2_500))
def test_what_fits_alone_runs_once_nothing_else_does_and_nothing_is_kept(plan, script, tokens):
    world = World(plan)
    run(world, script)
    for job in list(world.jobs):
        world.end(job)
    fits = world.budget.alone(Wish(tokens))
    chunk = world.admit(9, tokens)
    assert bool(chunk) == bool(fits) and chunk <= fits
