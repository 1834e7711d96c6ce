"""A reader who does what one page says: writes its files, runs its Python and its commands, compares what they print.

Every block is handled by an explicit rule. What no rule knows is a failure, so a page cannot contain a block that is
never checked.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tests.acceptance.nodes import ProcessNode, eventually
from tests.docs.pages import ROOT, Block, Hidden, Hint, parts_of
from tests.servers import free_port

COMMAND_SECONDS: Final = 60
LOG_SECONDS: Final = 60
_AGAIN_SECONDS: Final = 20

FILE: Final = re.compile(r"# (\w+\.py)\n")
"""The first line of a Python block that is a file."""

_ASSIGNMENT: Final = re.compile(r"[A-Z_]+=")
_SERVICE: Final = re.compile(r"\b(?:redis|rediss|postgresql|mysql|mariadb|amqp)://[^\s\"']*")

# Languages of blocks that nothing here can run. (Mermaid is compared where it is a command's output.)
NOT_RUN: Final = {"mermaid", "sql", "dockerfile"}

# Commands that change nothing: they are asked again until they show what the page shows, because workers take a moment.
_LOOKS: Final = re.compile(r"cat |dispatcher (chains (list|show|explain)|deliveries list|chain-types list|doctor)")

_NORMAL: Final = (
    (re.compile(r"\x1b\[[\d;]*m"), ""),
    (re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "<uuid>"),
    (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:\+00:00|Z)?"), "<time>"),
    (
        re.compile(r"^(DEBUG|INFO|WARNING|ERROR) (?!dispatcher\.plan:)dispatcher[\w.]*:", re.MULTILINE),
        r"\1 dispatcher:",
    ),
    (re.compile(r"succeeded in [\d.e-]+s"), "succeeded in <seconds>"),
    (re.compile(r"PoolWorker-\d+(?::\d+)?"), "PoolWorker"),
    (re.compile(r"celery@[\w.-]+"), "celery@host"),
    (re.compile(r"/\S*/\.dispatcher"), "<directory>/.dispatcher"),
    (re.compile(r"\d+\.\d+"), "<number>"),
    (re.compile(r" {2,}"), "  "),
)


class PageError(AssertionError):
    """What a page says is not what happens."""


class Started(ProcessNode):
    """A command of a page that runs until it is stopped."""

    def __init__(self, command: str, ready_prompt: str, root: Path, env: dict[str, str]) -> None:
        super().__init__(["/bin/bash", "-c", f"exec {command}"], root, env)
        self.command = command
        self.ready_prompt = ready_prompt
        self.was_ready = False
        self.read = 0

    def stop(self) -> None:
        """Stop it as Ctrl-C does where it has others to stop; kill what is left."""
        if self.command.startswith("dispatcher dev") and self.process is not None and self.status == "running":
            self.kill("SIGINT")
            eventually(lambda: self.status != "running", f"the end of {self.command}", seconds=20)
        self.kill()
        eventually(lambda: not self.processes(), f"the end of {self.command}", seconds=20)


class Reader:
    """Reads one page. `services` gives the URL of a private server for a URL that the page shows.

    `files` gives the files that a page shows, by the page's name: for pages that continue another one.
    """

    def __init__(
        self,
        page: str,
        text: str,
        directory: Path,
        *,
        services: Callable[[str], str],
        files: Callable[[str], Mapping[str, str]],
    ) -> None:
        self.page = page
        self.parts = parts_of(text)
        self.directory = directory
        self.count: Counter[str] = Counter()
        self._services = services
        self._files = files
        self._env = _environment(directory)
        self._started: list[Started] = []
        self._session: subprocess.Popen[str] | None = None
        self._replaced: list[tuple[str, str]] = []
        self._scripts: dict[str, int] = {}
        self._modules: dict[str, int] = {}
        self._exit_code = 0
        self._shown_only = False
        self._output: str | None = None
        self._looks: list[tuple[str, int]] = []
        self._line = 0

    def read(self) -> None:
        """Do all that the page says. Raises `PageError` naming page and line."""
        try:
            for number, part in enumerate(self.parts):
                self._line = part.line
                if isinstance(part, Hint):
                    self._follow(part.text)
                elif isinstance(part, Hidden):
                    self._run_python(part.text, "hidden Python run")
                else:
                    self._read_block(part, self.parts[number + 1 :])
            self._require_no_open_hint()
            for name, line in self._scripts.items():
                self._line = line
                self._fail(f"{name} is shown and never run")
            for name, line in self._modules.items():  # where no block has imported it
                self._line = line
                self._run_python(f"import {name}", "Python file imported")
        finally:
            self.stop()
            if self._session is not None:
                self._session.stdin.close()  # type: ignore[union-attr]
                try:
                    self._session.wait(20)
                finally:
                    self._session.kill()
                    self._session.wait()
                    self._session.stdout.close()  # type: ignore[union-attr]

    def stop(self) -> None:
        """Stop the commands that run."""
        while self._started:
            self._started.pop().stop()

    # --- hints -------------------------------------------------------------------------------------------------------

    def _follow(self, hint: str) -> None:
        word, _, rest = hint.partition(" ")
        if word == "continue":  # continue docs/tutorial.md: the reader has that page's files
            for name, content in self._files(rest).items():
                (self.directory / name).write_text(content)
        elif word == "env":  # env NAME=VALUE: set in the reader's terminal and application from the beginning
            for assignment in shlex.split(self._local(rest)):
                name, _, value = assignment.partition("=")
                self._env[name] = value
        elif word == "replace":  # replace OLD with NEW: shorter waits than a reader needs
            old, found, new = rest.partition(" with ")
            if not found:
                self._fail(f"not a replacement: {rest}")
            self._replaced.append((old, new))
        elif word == "stop":  # the reader presses Ctrl-C in every terminal
            self.stop()
        elif word == "run":  # run COMMAND: said in the text
            self._run_shell(rest)
        elif word == "exit":  # exit CODE: the next block's last command ends with it
            self._exit_code = int(rest)
        elif word == "shown-only:":  # shown-only: REASON
            self._shown_only = True
        else:
            self._fail(f"unknown hint: {hint}")

    # --- blocks ------------------------------------------------------------------------------------------------------

    def _read_block(self, block: Block, rest: list[Block | Hint | Hidden]) -> None:
        if self._shown_only and block.language == "text":
            self._shown_only = False
            self.count["text shown only"] += 1
            return
        if block.language != "sh":
            self._require_no_open_hint()
        if block.language == "python":
            self._read_python(block)
        elif block.language == "sh":
            self._run_shell(block.text, rest)
        elif block.language == "ini":
            self._run_unit(block.text)
        elif block.language == "text" or (block.language == "mermaid" and self._output is not None):
            self._compare(block.text)
        elif block.language in NOT_RUN:
            self.count[f"{block.language} not run"] += 1
        else:
            self._fail(f"no rule for a block of language {block.language!r}")

    def _read_python(self, block: Block) -> None:
        text = self._local(block.text)
        found = FILE.match(text)
        if found is None:
            self._run_python(text, "Python run")
            return
        path = self.directory / found[1]
        path.write_text(text)
        compile(text, str(path), "exec")
        if "sys.argv" in text:
            self._scripts[path.name] = block.line
        else:
            self._modules[path.stem] = block.line

    def _run_python(self, text: str, kind: str) -> None:
        text = self._local(text)
        ast.parse(text)
        if self._session is None:
            self._session = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("session.py"))],
                cwd=self.directory,
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._session.stdin is not None and self._session.stdout is not None
        request = {"page": self.page, "line": self._line, "code": text}
        print(json.dumps(request), file=self._session.stdin, flush=True)
        answer = self._session.stdout.readline()
        if not answer:
            self._fail("the page's Python has ended")
        result = json.loads(answer)
        if result["error"] is not None:
            self._fail(f"{result['output']}{result['error']}")
        self._output, self._looks = result["output"], []
        self.count[kind] += 1

    def _compare(self, shown: str) -> None:
        """Compare what a page shows with what the last block printed, else with what the running commands print."""
        shown = self._local(shown)
        if self._output is not None:
            output, self._output = self._output, None
            deadline = time.monotonic() + _AGAIN_SECONDS
            while normal(output) != normal(shown) and self._looks and time.monotonic() < deadline:
                output = "".join(self._command(command, "", expected) for command, expected in self._looks)
            if normal(output) != normal(shown):
                self._fail(f"the page shows\n{normal(shown)}\n--- but this is printed:\n{normal(output)}")
            self.count["output compared"] += 1
            return
        if not self._started:
            self._fail("there is no output to compare this text with")
        started = self._started[-1]
        # In the order of the blocks, not of their lines: those of several processes come in any order.
        started.read = min(self._wait_for_line(started, line) for line in normal(shown).splitlines()) + 1
        self.count["log compared"] += 1

    def _wait_for_line(self, started: Started, line: str) -> int:
        """The number of the line of the command's output that is this one, after those of the blocks before."""
        deadline = time.monotonic() + LOG_SECONDS
        while True:
            lines = started.logs().splitlines()
            found = next((n for n in range(started.read, len(lines)) if normal(lines[n]) == line), None)
            if found is not None:
                return found
            if time.monotonic() > deadline or started.status != "running":
                self._fail(f"the page shows\n{line}\n--- but this is printed:\n{started.tail()}")
            time.sleep(0.05)

    def _require_no_open_hint(self) -> None:
        if self._shown_only or self._exit_code:
            self._fail("a hint that no block follows")

    # --- commands ----------------------------------------------------------------------------------------------------

    def _run_shell(self, text: str, rest: list[Block | Hint | Hidden] | None = None) -> None:
        """Run the commands of a block one after the other; those that do not end are left running."""
        shown = next(
            (part.text for part in (rest or [])[:1] if isinstance(part, Block) and part.language == "text"), ""
        )
        answers = "".join(f"{answer}\n" for answer in re.findall(r"\[y/N\]: ([yn])$", shown, re.MULTILINE))
        commands = split_commands(self._local(text))
        output: list[str] = []
        asked: list[tuple[str, int]] = []
        for number, command in enumerate(commands):
            expected = self._exit_code if number == len(commands) - 1 else 0
            output.append(self._run_command(command, answers, expected))
            asked.append((command, expected))
        self._wait_until_ready()
        self._exit_code = 0
        self._looks = [one for one in asked if _LOOKS.match(one[0])]
        if len(self._looks) < len([one for one in output if one]):
            self._looks = []  # some of them act
        self._output = "".join(output) or None

    def _run_command(self, command: str, answers: str, expected: int) -> str:
        words = words_of(command)
        if not words:
            return ""
        for name in [name for name in self._scripts if name in words]:
            del self._scripts[name]
        rule = _rule_for(words)
        if rule is None:
            self._fail(f"no rule for the command {command!r}")
        assert rule is not None
        if rule == "start":
            self._start(command, words)
            return ""
        self._wait_until_ready()
        if rule == "run":
            self.count["command run"] += 1
            return self._command(command, answers, expected)
        problem = rule(words)
        if problem:
            self._fail(f"{command!r}: {problem}")
        self.count["command checked by a rule"] += 1
        return ""

    def _command(self, command: str, answers: str, expected: int = 0) -> str:
        """What a command prints. What it exports is kept for the commands after it."""
        kept = self.directory.parent / f"{self.directory.name}.env"
        script = f"{command}\ncode=$?\nexport -p > {shlex.quote(str(kept))}\nexit $code\n"
        done = subprocess.run(
            ["/bin/bash", "-c", script],
            cwd=self.directory,
            env=self._env,
            input=answers,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if done.returncode != expected:
            self._fail(f"{command!r} ended with {done.returncode}:\n{done.stdout}")
        for line in kept.read_text().splitlines():
            name, found, value = line.removeprefix("declare -x ").partition("=")
            if found:
                self._env[name] = "".join(shlex.split(value))
        return re.sub(r"\[y/N\]: ", "[y/N]: y\n", done.stdout) if answers else done.stdout

    def _start(self, command: str, words: list[str]) -> None:
        prompts = {"worker": " ready.", "beat": "beat: Starting...", "flower": "Visit me at", "dev": "] ready,"}
        kind = next(word for word in words if word in prompts)
        prompt = "ready, Ctrl-C stops everything" if kind == "dev" else prompts[kind]
        if kind in ("worker", "beat") and "--loglevel" not in words:  # which is how it is known to be ready
            command = f"{command.partition('#')[0].rstrip()} --loglevel INFO"
        if kind == "flower":
            self._env.update(FLOWER_PORT=str(free_port()), FLOWER_ADDRESS="127.0.0.1")
        started = Started(command.partition("  #")[0].strip(), prompt, self.directory.parent, dict(self._env))
        started.argv = ["/bin/bash", "-c", f"cd {shlex.quote(str(self.directory))} && exec {started.command}"]
        self._started.append(started)
        started.start()
        self.count["command started"] += 1

    def _wait_until_ready(self) -> None:
        """Those of one block are started together and waited for at its end: most of the time they import modules."""
        for started in self._started:
            if not started.was_ready:
                started.wait_until_ready()
                started.was_ready = True

    def _run_unit(self, text: str) -> None:
        """Start what a systemd unit starts, without the directory of its environment."""
        (start,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
        program, _, arguments = start.partition(" ")
        self._run_command(f"{Path(program).name} {arguments}", "", 0)
        self._wait_until_ready()
        self.count["unit started"] += 1

    # --- shared ------------------------------------------------------------------------------------------------------

    def _local(self, text: str) -> str:
        """The text of a block with private servers in place of those that it names."""
        for old, new in self._replaced:
            text = text.replace(old, new)
        return _SERVICE.sub(lambda found: self._services(found[0]), text)

    def _fail(self, problem: str) -> None:
        raise PageError(f"{self.page}:{self._line}: {problem}")


def normal(text: str) -> str:
    """A text without what differs from run to run: ids, times, ports, names of hosts and processes, widths."""
    for pattern, replacement in _NORMAL:
        text = pattern.sub(replacement, text)
    lines = (line.rstrip() for line in text.strip().splitlines())
    return "\n".join(line for line in lines if not line.startswith("%% "))  # Mermaid's comments


def split_commands(text: str) -> list[str]:
    """The commands of a shell block: one a line, continued lines and here-documents kept whole."""
    commands: list[str] = []
    lines = iter(text.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        command = line
        while command.endswith("\\"):
            command = f"{command[:-1]}{next(lines).strip()}"
        here = re.search(r"<<'(\w+)'", command)
        while here and not command.endswith(f"\n{here[1]}"):
            command += f"\n{next(lines)}"
        commands.append(command)
    return commands


def words_of(command: str) -> list[str]:
    """The words of a command's first line, without comments and assignments before it."""
    words = shlex.split(command.splitlines()[0], comments=True)
    while words and _ASSIGNMENT.match(words[0]):
        words = words[1:]
    return words


def _environment(directory: Path) -> dict[str, str]:
    """A new user's: the programs of this environment first, no settings, nothing of the developer's."""
    kept = {name: os.environ[name] for name in ("LANG", "LD_LIBRARY_PATH", "TZ") if name in os.environ}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**kept, "PATH": path, "HOME": str(directory), "PYTHONUNBUFFERED": "1"}


# --- rules of commands ------------------------------------------------------------------------------------------------


def _pip(words: list[str]) -> str | None:
    """`pip install`: cannot run here; the distribution and its extras must exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        found = re.fullmatch(r"(?:/path/to/)?([a-z-]+)(?:\[([a-z,]+)\])?", word)
        if found is None:
            if word == "--upgrade":
                continue
            return f"not understood: {word}"
        if found[1] != project["name"]:
            return f"the distribution is called {project['name']}"
        unknown = set((found[2] or "").split(",")) - {"", *project["optional-dependencies"]}
        if unknown:
            return f"no such extra: {', '.join(sorted(unknown))}"
    return None if words[1] == "install" else f"no rule for pip {words[1]}"


def _make(words: list[str]) -> str | None:
    """`make TARGET`: takes too long here; the target must exist."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = {word for word in words[1:] if "=" not in word} - targets
    return f"no such target: {', '.join(sorted(unknown))}" if unknown else None


def _compose(words: list[str]) -> str | None:
    """`docker compose`: no containers here; the services must be those of the file."""
    text = (ROOT / "docker-compose.yml").read_text().partition("\nservices:\n")[2].partition("\nvolumes:\n")[0]
    services = set(re.findall(r"^  ([a-z]+):$", text, re.MULTILINE))
    if words[1] != "compose" or words[2] not in ("up", "build", "stop", "run"):
        return f"no rule for {' '.join(words)}"
    named = {word.partition("=")[0] for word in words[3:] if not word.startswith("-")}
    if words[2] == "run":
        named = {next(word for word in words[3:] if not word.startswith("-"))}
    return f"no such service: {', '.join(sorted(named - services))}" if named - services else None


def _copy(words: list[str]) -> str | None:
    """`cp FILE .env`, in a clone: the file must be there."""
    return None if len(words) == 3 and (ROOT / words[1]).is_file() else "no such file in the repository"


def _environment_made(words: list[str]) -> str | None:
    """`python3 -m venv .venv` and `. .venv/bin/activate`: the test runs in an environment already."""
    return None if words in (["python3", "-m", "venv", ".venv"], [".", ".venv/bin/activate"]) else "not understood"


def _rule_for(words: list[str]) -> Callable[[list[str]], str | None] | str | None:
    """How a command is treated: "run", "start" (it does not end), a function that checks it, or None: not known."""
    match words:
        case ["pip", *_]:
            return _pip
        case ["make", *_]:
            return _make
        case ["docker", *_]:
            return _compose
        case ["cp", *_]:
            return _copy
        case ["python3", *_] | [".", *_]:
            return _environment_made
        case ["dispatcher", "dev", *_]:
            return "start"
        case ["celery", *rest] if {"worker", "beat", "flower"} & set(rest):
            return "start"
        case ["dispatcher" | "python" | "celery" | "cat" | "export", *_]:
            return "run"
    return None
