"""Backends with a limit: who spills over, who waits, in which order, and who is turned away."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fleet import Fleet
from router.scripted import Wire, says
from router.stack import stream_answer
from tqstack.router.queue import Queue, QueueFullError


def serve(queue: Queue, *free: str) -> tuple[str, str] | None:
    served = queue.serve(lambda place: place in free)
    return (served[0].client, served[1]) if served else None


def test_clients_take_turns_and_are_each_served_in_their_own_order():
    queue = Queue(limit=10)
    many = [queue.join("many", ("a",), False) for _ in range(3)]
    few = queue.join("few", ("a",), False)
    assert [queue.position(ticket) for ticket in (*many, few)] == [1, 3, 4, 2]
    assert [serve(queue, "a") for _ in range(5)] == [
        *(("many", "a"), ("few", "a"), ("many", "a"), ("many", "a"), None),
    ]


def test_background_prompts_yield():
    queue = Queue(limit=10)
    queue.join("me", ("a",), True)
    queue.join("me", ("a",), False)
    queue.join("you", ("a",), False)
    titles = [ticket.turn for ticket in queue if ticket.client == "me"]
    assert [serve(queue, "a") for _ in range(3)] == [("me", "a"), ("you", "a"), ("me", "a")]
    assert titles == sorted(titles)


def test_each_waits_for_the_places_that_it_wants_only():
    queue = Queue(limit=2)
    queue.join("x", ("a",), False)
    queue.join("y", ("b", "a"), False)
    assert serve(queue, "b", "c") == ("y", "b")
    assert serve(queue, "b") is None
    queue.join("z", ("a",), False)
    with pytest.raises(QueueFullError):
        queue.join("z", ("a",), False)


@given(
    st.lists(
        st.tuples(st.sampled_from("wxyz"), st.sampled_from(["a", "b", "ab"]), st.booleans())
        | st.sampled_from("ab"),
        max_size=60,
    )
)
def test_nobody_starves_and_no_place_stays_free_that_is_wanted(events):
    """Every event is one that joins, or a place that becomes free."""
    queue, waited = Queue(limit=20), {}
    for event in events:
        if isinstance(event, str):
            served = queue.serve(lambda place, free=event: place == free)
            if served is None:
                assert not any(event in ticket.wants for ticket in queue)
                continue
            ticket, place = served
            assert place in ticket.wants
            # So many others at most came later and were served before it, for each client.
            assert waited.pop(ticket) <= 4 * 10
            for other in queue:
                if place in other.wants and other.turn[1] < ticket.turn[1]:
                    waited[other] += 1
            continue
        client, wants, background = event
        try:
            waited[queue.join(client, tuple(wants), background)] = 0
        except QueueFullError:
            assert len(queue) == 20
    assert len(queue) == len(waited)
    for _ in range(len(queue)):
        assert queue.serve(lambda place: True)


class Gate:
    """A script that answers when the test lets it."""

    def __init__(self, word: str):
        self.word, self.open = word, asyncio.Semaphore(0)

    async def __call__(self, wire: Wire) -> None:
        await self.open.acquire()
        await says(self.word)(wire)


@pytest.fixture
def fleet(tmp_path):
    settings = {"router_max_queue": 3, "router_ping_seconds": 0.05}
    fleet = Fleet(tmp_path, settings, desk={"at_once": 1}, shed={"at_once": 1, "priority": 1})
    for backend in fleet.scripted[2:]:
        backend.script = Gate(backend.name)
    with fleet:
        fleet.probe()
        yield fleet


async def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


class Asking:
    def __init__(self, fleet: Fleet):
        self.fleet = fleet
        self.client = httpx.AsyncClient(base_url=fleet.url, timeout=20, trust_env=False)

    async def __aenter__(self) -> Asking:
        return self

    async def __aexit__(self, *_) -> None:
        await self.client.aclose()

    def ask(self, text: str = "hello") -> asyncio.Task[httpx.Response]:
        body = {"messages": [{"role": "user", "content": text}], "stream": True}
        return asyncio.ensure_future(self.client.post("/v1/chat/completions", json=body))

    async def status(self) -> dict:
        return (await self.client.get("/status")).json()


def test_full_backends_spill_over_then_queue_then_turn_away(fleet):
    desk, shed = fleet["desk"], fleet["shed"]

    async def scenario() -> None:
        slots = fleet.app.state.services.slots
        async with Asking(fleet) as asking:
            first = asking.ask()
            await until(lambda: desk.busy)
            second = asking.ask()
            await until(lambda: shed.busy)
            waiting = []
            for i in range(3):
                waiting.append(asking.ask())
                await until(lambda i=i: slots.waiting == i + 1)
            status = await asking.status()
            assert status["waiting"] == 3
            positions = [record["position"] for record in status["requests"]]
            assert positions == [None, None, 1, 2, 3]
            turned_away = await asking.ask()
            assert turned_away.status_code == 429
            assert turned_away.headers["retry-after"]
            assert turned_away.json()["error"]["code"] == "queue_full"
            assert (desk.busy, shed.busy) == (1, 1)
            await asyncio.sleep(0.2)  # for a ping or two
            shed.script.open.release()
            answer = await second
            assert answer.headers["x-tqstack-backend"] == "shed"
            assert answer.headers["x-tqstack-reason"] == "desk-full"
            assert answer.headers["x-tqstack-fallback-from"] == "desk"
            for _ in range(4):
                desk.script.open.release()
                shed.script.open.release()
            assert stream_answer(await first) == ("desk", None)
            answers = await asyncio.gather(*waiting)
            assert all(stream_answer(one)[0] in ("desk", "shed") for one in answers)
            assert ": all backends are busy; position 1 in the queue" in answers[0].text
            assert ": all backends are busy; position 2 in the queue" in answers[1].text

    fleet.run(scenario())
    fleet.settle()
    assert all(backend.load.running == 0 for backend in fleet.app.state.services.backends.values())


def test_who_leaves_the_queue_gives_up_the_place_and_no_slot_is_lost(fleet):
    desk, shed = fleet["desk"], fleet["shed"]

    async def scenario() -> None:
        slots = fleet.app.state.services.slots
        async with Asking(fleet) as asking:
            running = [asking.ask(), asking.ask()]
            await until(lambda: desk.busy and shed.busy)
            leaving = [asking.ask() for _ in range(3)]
            await until(lambda: slots.waiting == 3)
            for task in leaving:
                task.cancel()
            await until(lambda: slots.waiting == 0)
            staying = asking.ask()
            await until(lambda: slots.waiting == 1)
            # The one that runs leaves: who waits has its slot.
            running[0].cancel()
            await until(lambda: slots.waiting == 0)
            for _ in range(2):
                desk.script.open.release()
                shed.script.open.release()
            assert (await staying).headers["x-tqstack-backend"] == "desk"
            await running[1]

    fleet.run(scenario())
    fleet.settle()
    assert all(backend.load.running == 0 for backend in fleet.app.state.services.backends.values())
    metrics = fleet.http.get("/metrics").text
    assert "tqstack_router_waiting 0.0" in metrics


def test_a_title_waits_behind_a_question(fleet):
    desk, shed = fleet["desk"], fleet["shed"]

    async def scenario() -> None:
        slots = fleet.app.state.services.slots
        async with Asking(fleet) as asking:
            running = [asking.ask(), asking.ask()]
            await until(lambda: desk.busy and shed.busy)
            title = asking.ask("### Task:\nGive a title.")
            await until(lambda: slots.waiting == 1)
            question = asking.ask("a question")
            await until(lambda: slots.waiting == 2)
            desk.script.open.release()
            await until(lambda: len(desk.seen) == 2)
            assert desk.seen[1].json["messages"][0]["content"] == "a question"
            for _ in range(2):
                desk.script.open.release()
                shed.script.open.release()
            await asyncio.gather(title, question, *running)

    fleet.run(scenario())


def test_a_slot_that_a_failed_attempt_had_is_free_for_the_next(fleet):
    async def fails(wire: Wire) -> None:
        wire.cut()

    fleet["desk"].script, fleet["shed"].script = fails, says("shed")
    for _ in range(3):
        assert fleet.chat().headers["x-tqstack-backend"] == "shed"
    fleet.settle()
    assert all(backend.load.running == 0 for backend in fleet.app.state.services.backends.values())
