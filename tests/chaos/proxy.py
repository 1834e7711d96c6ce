"""A TCP proxy on the loopback that can cut, delay and half-open the connections through it."""

import asyncio
import socket
import threading
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
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"proxy-{target}", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Close every connection; new ones are taken."""
        self._loop.call_soon_threadsafe(self._abort_all)

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
        self._writers.add(writer)
        try:
            there_reader, there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(there)
        await asyncio.gather(self._pump(reader, there), self._pump(there_reader, writer))
        for one in (writer, there):
            self._writers.discard(one)
            one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self.silent:
                    continue
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                writer.write(data)
                await writer.drain()
        with suppress(OSError, RuntimeError):
            if writer.can_write_eof():
                writer.write_eof()
