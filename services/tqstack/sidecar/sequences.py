"""The sequences of one request, run beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from tqstack.engine.engine import Engine
from tqstack.engine.jobs import Progress
from tqstack.openai_api.schema import ChatRequest, TextRequest
from tqstack.sidecar.generation import Finish, Generation
from tqstack.sidecar.jobs import ranked, samples
from tqstack.sidecar.text import Part

Piece = Progress | Part | Finish


async def run_all(
    engine: Engine, generations: list[Generation]
) -> AsyncGenerator[tuple[Generation, Piece], None]:
    """What all of them yield, as it comes. Samples of one prompt go on from one reading of it. The
    first failure ends all.

    Raises:
        ApiError: the engine refused one, or failed.
    """
    by_prompt: dict[int, list[Generation]] = {}
    for one in generations:
        by_prompt.setdefault(id(one.prompt), []).append(one)
    for same in by_prompt.values():
        engine.submit_all([one.begin() for one in same])
    if len(generations) == 1:
        async with aclosing(generations[0].run()) as pieces:
            async for piece in pieces:
                yield generations[0], piece
        return
    queue: asyncio.Queue[tuple[Generation, Piece | Exception]] = asyncio.Queue()

    async def run(one: Generation) -> None:
        try:
            async with aclosing(one.run()) as pieces:
                async for piece in pieces:
                    await queue.put((one, piece))
        except Exception as error:
            await queue.put((one, error))

    tasks = [asyncio.create_task(run(one)) for one in generations]
    running = len(tasks)
    try:
        while running:
            one, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            running -= isinstance(piece, Finish)
            yield one, piece
    finally:
        for one, task in zip(generations, tasks, strict=True):
            task.cancel()
            one.stop()  # also where its task had not begun
        await asyncio.gather(*tasks, return_exceptions=True)


def best(generations: list[Generation], request: ChatRequest | TextRequest) -> list[Generation]:
    """Those that are given of what was made: of each prompt the likeliest, if more were made than
    are wanted. Their choices are numbered anew."""
    if not ranked(request):
        return generations
    wanted, made, chosen = request.n or 1, samples(request), []
    for at in range(0, len(generations), made):
        group = sorted(generations[at : at + made], key=lambda one: -one.likelihood)
        chosen += group[:wanted]
    for index, one in enumerate(chosen):
        one.choice.index = index
    return chosen
