"""The sequences of one request, run beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from tqstack.engine.jobs import Progress
from tqstack.sidecar.generation import Finish, Generation
from tqstack.sidecar.text import Part

Piece = Progress | Part | Finish


async def run_all(generations: list[Generation]) -> AsyncGenerator[tuple[Generation, Piece], None]:
    """What all of them yield, as it comes. The first failure ends all.

    Raises:
        ApiError: the engine refused one, or failed.
    """
    if len(generations) == 1:
        async with aclosing(generations[0].run()) as pieces:
            async for piece in pieces:
                yield generations[0], piece
        return
    queue: asyncio.Queue[tuple[Generation, Piece | Exception]] = asyncio.Queue()
    leaders = {id(one.prompt): one for one in generations[::-1]}
    read = {key: asyncio.Event() for key in leaders}

    async def run(one: Generation) -> None:
        key = id(one.prompt)
        try:
            # The first sample of a prompt reads it; the others go on from what is kept of that.
            if leaders[key] is not one:
                await read[key].wait()
            async with aclosing(one.run()) as pieces:
                async for piece in pieces:
                    if not isinstance(piece, Progress):
                        read[key].set()
                    await queue.put((one, piece))
        except Exception as error:
            await queue.put((one, error))
        finally:
            read[key].set()

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
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
