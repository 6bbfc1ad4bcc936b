"""Work on an event loop in a thread of its own: it goes on while a loss is computed, and can be called off at once."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import CancelledError, Future
from typing import Any

from .connection import EndpointError


class Background:
    """The loop and its thread. name: whose work it is, for errors. last: awaited when all other work is called off."""

    def __init__(self, name: str, last: Callable[[], Awaitable[None]]):
        self.name, self.last, self.process, self.closed = name, last, os.getpid(), False
        self._gate, self._submitted = threading.Lock(), set[Future[Any]]()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True, name="fdistill endpoint")
        self._thread.start()

    def submit(self, work: Callable[..., Awaitable[Any]], *arguments: Any) -> Future[Any]:
        """Begins it; EndpointError where the loop is closed, or another process's."""

        async def in_a_scope() -> Any:  # so that whoever cancels the future calls the requests off as `all_of` does
            return (await all_of([(work, *arguments)]))[0]

        if os.getpid() == self.process:
            with self._gate:  # what is submitted before `close` is there to be called off by it
                if not self.closed:
                    future = asyncio.run_coroutine_threadsafe(in_a_scope(), self.loop)
                    self._submitted.add(future)
                    future.add_done_callback(self._submitted.discard)
                    return future
        raise EndpointError(f"{self.name} is closed, or belongs to the process that forked this one")

    def result(self, future: Future[Any]) -> Any:
        """Waits for what was submitted; an interrupt calls it off. EndpointError: the loop was closed meanwhile."""
        try:
            return future.result()
        except CancelledError as error:
            raise EndpointError(f"{self.name} was closed before it answered") from error
        finally:
            future.cancel()  # where the caller was interrupted

    def run(self, work: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """The result of work that is begun now."""
        return self.result(self.submit(work, *arguments))

    def close(self) -> None:
        """Calls all work off, and ends the thread."""
        if os.getpid() != self.process:
            return
        with self._gate:
            if self.closed:
                return
            self.closed = True
            for future in tuple(self._submitted):
                future.cancel()
            asyncio.run_coroutine_threadsafe(self._end(), self.loop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self.loop.close()

    async def _end(self) -> None:
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
        await self.last()
        self.loop.call_soon(self.loop.stop)


async def all_of(work: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The results of functions with their arguments, in order; the first failure calls off the rest.

    They run in a scope of anyio, which httpx is written for: if it calls off a request, the connection is given back,
    which a task's own `cancel` does not always achieve.
    """
    import anyio

    calls, failed = list(work), list[Exception]()
    found: list[Any] = [None] * len(calls)
    async with anyio.create_task_group() as group:

        async def one(number: int, function: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
            try:
                found[number] = await function(*arguments)
            except Exception as error:
                failed.append(error)
                group.cancel_scope.cancel()

        for number, call in enumerate(calls):
            group.start_soon(one, number, *call)
    if failed:
        raise failed[0]
    return found
