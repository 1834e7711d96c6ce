"""Lua scripts in Redis. The server caches them, so a call sends the script's hash, and its text only when needed."""

import hashlib
from typing import Any

import redis
from redis.exceptions import NoScriptError


class Script:
    """A Lua script. It builds its keys from its arguments, so it has no KEYS.

    Thousands of KEYS would cost a batch more than the rest of the script. (This does not work on a Redis cluster, but
    Celery cannot use a cluster as its broker either.)
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def run(self, client: redis.Redis, *arguments: str | int) -> Any:
        """The script's answer. Bypasses `register_script` of the client, which takes three times as long.

        If the answer is lost, the script runs again with the same arguments.
        """
        pool = client.connection_pool
        connection: Any = pool.get_connection()

        def exchange() -> Any:
            connection.send_command("EVALSHA", self.sha, 0, *arguments)
            try:
                return connection.read_response()
            except NoScriptError:  # the server was restarted, or its scripts were flushed
                connection.send_command("EVAL", self.text, 0, *arguments)
                return connection.read_response()

        try:
            return connection.retry.call_with_retry(exchange, lambda _: connection.disconnect())
        finally:
            pool.release(connection)
