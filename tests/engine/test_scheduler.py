"""The scheduler on a simulated machine: whoever comes, all end, in turn, and nobody waits long."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.machine import GAP, Job, Machine, jobs, machines
from tqstack.engine.scheduler import (
    EARNED,
    FIRST_CHUNK,
    LOAN,
    SMALLEST_CHUNK,
    Scheduler,
    Step,
    Waiter,
)


@settings(max_examples=150, deadline=None)
@given(machines, st.lists(jobs(), max_size=20))
def test_all_that_is_admitted_ends_and_nothing_is_lost_or_run_twice(machine, coming):
    machine.run(coming)
    assert sorted([*machine.ended, *machine.refused]) == list(range(len(coming)))
    assert sorted(machine.begun) == sorted(machine.ended)
    for job in machine.ended:
        assert machine.read[job] == machine.jobs[job].tokens - machine.jobs[job].kept
    for job, why in machine.refused.items():
        never = machine.jobs[job].nbytes > machine.nbytes
        assert never == (why == "insufficient_memory")
        assert (job in machine.lost) >= (why == "step")


@settings(max_examples=150, deadline=None)
@given(machines, st.lists(jobs() | st.integers(0, 30), max_size=30), st.data())
def test_a_job_that_is_cancelled_at_any_moment_leaves_no_trace(machine, script, data):
    """A number is that many steps."""
    for what in script:
        if isinstance(what, Job):
            machine.submit(what)
            continue
        for _ in range(what):
            machine.step()
        alive = [j for j in range(len(machine.jobs)) if j not in machine.ended]
        if alive:
            machine.cancel(data.draw(st.sampled_from(alive)))  # some were refused: no harm
    while not machine.idle:
        machine.step()
    gone = {*machine.ended, *machine.refused, *machine.cancelled}
    assert gone == set(range(len(machine.jobs))) and not machine.held
    fresh = Scheduler(machine, machine.running, machine.waiting, GAP)
    fresh._pace = machine.scheduler._pace  # this it has learnt
    assert vars(machine.scheduler) == vars(fresh) and fresh.next() == Step()


def test_a_short_prompt_overtakes_a_long_one():
    machine = Machine()
    (long,) = machine.submit(Job(100_000))
    machine.until(lambda: machine.read[long] > 10_000)
    (short,) = machine.submit(Job(200))
    came, before = machine.clock, machine.read[long]
    machine.read_until_decoding(short)
    assert machine.read[long] == before and machine.clock - came <= 200 * machine.pace + 0.1
    machine.until(lambda: machine.idle)
    assert machine.ended == [short, long]


def test_a_long_prompt_overtaken_again_and_again_is_read_in_time():
    machine = Machine()
    (long,) = machine.submit(Job(100_000))
    while long not in machine.decoding:
        machine.step_in_a_crowd(Job(500, answer=2))
    others = sum(machine.read.values()) - machine.read[long]
    assert 20_000 < others <= 100_000 + machine.chunk


def test_a_long_prompt_that_comes_last_is_read_within_twice_its_work():
    machine = Machine(running=2)
    machine.submit(*[Job(500, answer=2)] * 3)
    (long,) = machine.submit(Job(20_000))
    while long not in machine.decoding:
        machine.step_in_a_crowd(Job(500, answer=2))
    assert sum(machine.read.values()) <= 2 * 20_000 + 4 * 500


def test_a_job_that_does_not_fit_beside_others_waits_and_then_has_its_turn():
    machine = Machine()
    machine.submit(*[Job(300, answer=2, nbytes=30)] * 3)
    machine.step()
    (big,) = machine.submit(Job(4_000, nbytes=80))
    while big not in machine.held:
        machine.step_in_a_crowd(Job(300, answer=2, nbytes=30))
    assert len(machine.ended) > 3 and sum(machine.read.values()) <= 4_000 + 4 * 300


def test_what_fits_goes_ahead_until_what_does_not_has_waited_enough():
    machine = Machine()
    machine.submit(Job(100, answer=1_000, nbytes=30))
    machine.step()
    (big,) = machine.submit(Job(2_000, nbytes=80))
    (small,) = machine.submit(Job(100, nbytes=30))
    machine.until(lambda: small in machine.ended)
    (other,) = machine.submit(Job(1_900, nbytes=30))
    machine.until(lambda: other in machine.ended)
    (late,) = machine.submit(Job(1, nbytes=30))
    machine.until(lambda: big in machine.held)
    assert machine.ended[-1] == 0 and late not in machine.begun


def test_a_longer_prompt_takes_no_room_before_its_turn():
    machine = Machine()
    short, longer = machine.submit(Job(5_000), Job(6_000))
    while short not in machine.decoding:
        machine.step()
        assert longer not in machine.held
    machine.step()
    assert longer in machine.held


def test_equal_prompts_are_read_in_the_order_in_which_they_came():
    machine = Machine()
    numbers = machine.submit(*[Job(5_000)] * 4)
    machine.until(lambda: machine.idle)
    order = [chunk.job for chunk in machine.chunks]
    assert order == sorted(order) and machine.begun == numbers


@settings(max_examples=60, deadline=None)
@given(
    st.floats(1e-5, 3 * GAP / 2 / SMALLEST_CHUNK),
    st.floats(0.02, 1.0),
    st.sampled_from([256, 2_048, 16_384]),
    st.lists(jobs(), max_size=5),
)
def test_gaps_are_bounded_and_sequences_get_their_share(pace, decode, chunk, others):
    machine = Machine(pace=pace, decode=decode, chunk=chunk, running=8, nbytes=1_000)
    (stream,) = machine.submit(Job(1_000, answer=1 << 40))
    machine.read_until_decoding(stream)
    (long,) = machine.submit(Job(8_000))
    borrowed = (LOAN + 1) * GAP if others else 0.0
    began, decoded, first = machine.clock, machine.decoded, len(machine.chunks)
    while long not in machine.decoding:
        while others and others[0].at <= machine.clock - began:
            machine.submit(others.pop(0))
        machine.step()
    smallest = SMALLEST_CHUNK * pace
    chunks = machine.chunks[first:]
    assert all(chunk.seconds <= max(GAP, smallest) + 1e-9 for chunk in chunks)
    paid = machine.clock - began - GAP - smallest - borrowed  # these are paid for afterwards
    assert machine.decoded - decoded >= 0.4 * paid


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([1e-5, 1e-3]),
    st.sampled_from([0.0001, 0.01, 0.9]),
    st.lists(jobs(), max_size=8),
    st.lists(st.integers(200, 480), min_size=8, max_size=15),
)
def test_what_reading_takes_from_sequences_is_bounded_and_paid_back(pace, decode, others, crowd):
    machine = Machine(pace=pace, decode=decode, running=16)
    machine.run([*others, *(Job(tokens, answer=50) for tokens in crowd)])
    unknown = FIRST_CHUNK * machine.pace
    assert machine.most_unpaid <= (LOAN + 2) * GAP + unknown + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.floats(0.02, (LOAN + 1) * GAP), st.floats(0.001, 0.05))
def test_prompts_that_come_together_are_read_before_one_goes_on(count, seconds, decode):
    """As long as all but the first take no longer than reading may borrow, and each a gap."""
    tokens = 400
    pace = min(seconds / (count - 1), 0.99 * GAP) / tokens
    machine = Machine(pace=pace, decode=decode, running=8)
    machine.submit(Job(tokens))
    machine.until(lambda: machine.idle)  # now its speed is known
    numbers = machine.submit(*[Job(tokens, answer=1_000, stops=(tokens - 8,))] * count)
    machine.until(lambda: machine.decoding.get(numbers[0], 0) > 2 * count)  # one for each chunk
    assert len(machine.decoding) == count


def beside_a_stream(**changes):
    """A machine whose speed is known, with a sequence that decodes for ever."""
    machine = Machine(running=16, **changes)
    (stream,) = machine.submit(Job(400, answer=1 << 40))
    machine.read_until_decoding(stream)
    return machine, stream


def test_a_prompt_that_comes_alone_borrows_nothing():
    machine, stream = beside_a_stream()
    (first,) = machine.submit(Job(450))
    machine.until(lambda: first in machine.ended)
    machine.submit(Job(400))
    made, chunks = machine.decoding[stream], len(machine.chunks)
    machine.until(lambda: len(machine.chunks) > chunks)
    assert (machine.decoding[stream] - made) * machine.decode * EARNED >= 0.4 - GAP / 4


def test_a_long_prompt_borrows_nothing_however_long_it_has_waited():
    machine, _ = beside_a_stream()
    machine.submit(Job(100, answer=400, nbytes=50))
    machine.step()
    (long,) = machine.submit(Job(2_000, nbytes=60))
    machine.submit(*[Job(480, answer=2)] * 6)
    machine.until(lambda: len(machine.ended) == 7)
    assert long not in machine.held and machine.unpaid == 0.0
    machine.most_unpaid = 0.0
    machine.until(lambda: machine.read[long] > 1_000)
    assert machine.most_unpaid <= GAP + SMALLEST_CHUNK * machine.pace


def test_what_was_kept_wholly_decodes_at_once_while_others_pay_back():
    machine, _ = beside_a_stream(decode=0.001)
    machine.submit(*[Job(450)] * 6)
    machine.until(lambda: not machine.scheduler.waits)
    assert machine.unpaid > 2 * GAP
    (kept,) = machine.submit(Job(8_000, kept=8_000))
    came = machine.clock
    machine.read_until_decoding(kept)
    assert machine.clock - came <= 2 * GAP


def test_a_prompt_that_fits_into_the_gap_is_read_whole():
    machine, _ = beside_a_stream()
    machine.submit(Job(450))
    machine.step()
    assert machine.chunks[-1].tokens == 450


def test_a_gap_is_small_before_the_machines_speed_is_known():
    machine = Machine()
    (stream,) = machine.submit(Job(SMALLEST_CHUNK - 1, answer=100))
    machine.read_until_decoding(stream)
    machine.submit(Job(10_000))
    machine.step()
    assert machine.chunks[-1].tokens == FIRST_CHUNK


def test_gaps_stay_bounded_while_reading_becomes_slower_with_every_token():
    machine = Machine(pace=0.0002, decode=0.01, running=2)
    (stream,) = machine.submit(Job(3_000, answer=1 << 40))
    machine.read_until_decoding(stream)
    (long,) = machine.submit(Job(200_000))
    first = len(machine.chunks)
    while long not in machine.decoding:
        machine.pace = 0.0002 * (1 + machine.read[long] / 20_000)
        machine.step()
    assert max(chunk.seconds for chunk in machine.chunks[first:]) <= 1.2 * GAP


def test_chunks_are_full_while_nobody_waits_and_only_then():
    machine = Machine(pace=0.01)
    (long,) = machine.submit(Job(100_005))
    machine.step()
    (short,) = machine.submit(Job(500))
    machine.until(lambda: short in machine.ended)
    beside = [chunk.tokens for chunk in machine.chunks[1:]]
    assert max(beside) == 32  # 0.32 s: two of them would be more than the gap
    machine.read_until_decoding(long)
    alone = [chunk.tokens for chunk in machine.chunks[1 + len(beside) :]]
    assert {*alone[:-1]} == {machine.chunk} and machine.chunks[0].tokens == machine.chunk


def test_chunks_end_at_every_stop():
    machine = Machine(chunk=1_000)
    (job,) = machine.submit(Job(2_500, kept=100, stops=(100, 130, 1_130, 1_131, 2_500)))
    machine.read_until_decoding(job)
    assert [chunk.tokens for chunk in machine.chunks] == [30, 1_000, 1, 1_000, 369]


def test_more_than_may_wait_are_turned_away():
    machine = Machine(running=1, waiting=2)
    machine.submit(Job(10, answer=100))
    machine.step()
    machine.submit(Job(10), Job(10), Job(10))
    assert machine.refused == {3: "queue_full"} and machine.scheduler.waits == 2
    machine.cancel(1)
    assert machine.scheduler.submit(Waiter(1, 10)) is None


def test_what_never_fits_is_refused_at_once_and_the_others_run():
    machine = Machine(waiting=1)
    machine.submit(Job(10, nbytes=101), Job(10))
    assert machine.refused == {0: "insufficient_memory"}
    machine.until(lambda: machine.idle)
    assert machine.ended == [1]


def test_what_does_not_fit_is_refused_when_nothing_runs_not_before():
    machine = Machine(lost=frozenset([1]))
    machine.submit(Job(10, answer=5))
    machine.step()
    machine.submit(Job(10), Job(10))
    machine.until(lambda: not machine.scheduler.runs)
    assert sorted(machine.ended) == [0, 2] and machine.refused == {}
    machine.step()
    assert machine.refused == {1: "step"} and machine.idle


def test_a_prompt_that_was_kept_wholly_decodes_at_once():
    machine = Machine()
    machine.submit(Job(5_000, kept=5_000), Job(0))
    for _ in range(3):
        machine.step()
    assert machine.decoding == {0: 2, 1: 2} and not any(machine.read.values())


def test_a_prompt_kept_wholly_decodes_at_once_beside_one_being_read():
    machine = Machine()
    stream, _ = machine.submit(Job(100, answer=1 << 40), Job(50_000))
    machine.read_until_decoding(stream)
    machine.until(lambda: machine.read[1] > 10_000)
    came = machine.clock
    (kept,) = machine.submit(Job(8_000, kept=8_000))
    machine.read_until_decoding(kept)
    assert machine.clock - came <= 2 * GAP + 3 * machine.decode


def test_a_shorter_rest_goes_first_whatever_the_length_of_the_prompt():
    machine = Machine()
    _, rest = machine.submit(Job(900), Job(50_000, kept=49_500))
    machine.step()
    assert machine.chunks[0].job == rest


def test_jobs_of_one_prompt_wait_for_its_reader_or_take_its_place():
    machine = Machine()
    machine.jobs = [Job(300), Job(300), Job(300)]
    for number in range(3):
        waiter = Waiter(number, 300, after=0 if number else None)
        assert machine.scheduler.submit(waiter) is None
    machine.step()
    assert machine.begun == [0] and machine.scheduler.waits == 2
    machine.cancel(0)
    machine.step()
    assert machine.begun == [0, 1]
    machine.jobs[2].kept = 300  # what job 1 has read by then
    machine.until(lambda: machine.idle)
    assert machine.ended == [1, 2] and machine.read[2] == 0
