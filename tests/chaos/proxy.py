"""A TCP proxy on the loopback that can cut, delay and half-open the connections through it, and lose an answer."""

import asyncio
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

_CHUNK: Final = 65536


class Proxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target`, in a thread of its own, until `close()`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay_seconds = 0.0
        self.silent = False
        """While true nothing is forwarded and nothing is closed: the other side has vanished."""
        self.refuses = False
        """While true new connections are closed at once, as where nobody listens."""
        self.lost = 0
        """How many answers were lost."""
        self._lossy = re.compile(b"")
        self._to_lose = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"proxy-{target}", daemon=True)
        self._thread.start()

    def lose_answers(self, pattern: bytes, times: int = 1) -> None:
        """Lose the answers to the next questions that have this pattern: the server acts, the connection is cut."""
        self._lossy, self._to_lose = re.compile(pattern), times

    def cut(self) -> None:
        """Close every connection; new ones are taken."""
        self._loop.call_soon_threadsafe(self._abort_all)

    def refuse(self) -> None:
        """Close every connection, and new ones at once, until `refuses` is false again."""
        self.refuses = True
        self.cut()

    def speak(self) -> None:
        """End the silence. Connections that lived through it are reset, as after a failover: their bytes are gone."""
        if self.silent:
            self.cut()
            self.silent = False

    def close(self) -> None:
        """End the proxy and its thread."""
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._server = self._loop.run_until_complete(asyncio.start_server(self._accept, sock=self._listener))
            self._loop.run_forever()
            self._server.close()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        finally:
            self._loop.close()

    def _stop(self) -> None:
        self._abort_all()
        self._loop.stop()

    def _abort_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            there_reader, there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(there)
        unanswered = asyncio.Event()
        await asyncio.gather(
            self._pump(reader, there, lambda data: self._note_question(data, unanswered)),
            self._pump(there_reader, writer, lambda _: self._loses(unanswered)),
        )
        for one in (writer, there):
            self._writers.discard(one)
            one.transport.abort()

    def _note_question(self, data: bytes, unanswered: asyncio.Event) -> bool:
        if self._to_lose and self._lossy.search(data):
            self._to_lose -= 1
            unanswered.set()
        return False

    def _loses(self, unanswered: asyncio.Event) -> bool:
        self.lost += unanswered.is_set()
        return unanswered.is_set()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cuts: Callable[[bytes], bool]
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self.silent:
                    continue
                if cuts(data):
                    writer.transport.abort()
                    return
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                writer.write(data)
                await writer.drain()
        with suppress(OSError, RuntimeError):
            if writer.can_write_eof():
                writer.write_eof()
