"""A wall clock that steps while processes look at it: a library for LD_PRELOAD, and the file that moves it.

It is the library of `tests.chaos.skew`, but the offset can change: it is read from a file at each look at the clock.
What is said there holds here, too: CLOCK_REALTIME is shifted; CLOCK_MONOTONIC, file times and the kernel's own timers
are left alone.

    with SteppingClock() as clock:
        server = RedisServer()
        server.environment = clock.environment
        with server:
            clock.step(days=2)   # from now on, for all processes with this environment
            clock.step(seconds=-2)
            clock.set(0)         # right again

Some servers look at the clock only now and then (Valkey at each turn of its loop): wait until they show the step. Where
there is no C compiler, `NoCompilerError` is raised.
"""

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Final, Self

from tests.chaos.skew import NoCompilerError

__all__ = ["NoCompilerError", "SteppingClock"]

FILE_VARIABLE: Final = "TEST_CLOCK_OFFSET_FILE"

# The file has one number, the offset in nanoseconds. It is mapped into memory, because clocks are looked at often. The
# number is written and read at once, because it is aligned. A child of a fork has the same page.
_SOURCE: Final = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static int64_t offset(void) {
  static volatile int64_t *place; static int known;
  if (!known) {
    const char *path = getenv("TEST_CLOCK_OFFSET_FILE");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file >= 0) {
      void *page = mmap(0, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
      if (page != MAP_FAILED) place = page;
      close(file);
    }
    known = 1;
  }
  return place ? *place : 0;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
  int failed = syscall(SYS_clock_gettime, clock, at);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
    int64_t moment = at->tv_sec * INT64_C(1000000000) + at->tv_nsec + offset();
    at->tv_sec = moment / INT64_C(1000000000); at->tv_nsec = moment % INT64_C(1000000000);
  }
  return failed;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
  struct timespec now; (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) { at->tv_sec = now.tv_sec; at->tv_usec = now.tv_nsec / 1000; }
  return 0;
}
time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""


class SteppingClock:
    """The clock of the processes that are started with `environment`. It is right until it is moved."""

    def __init__(self) -> None:
        # Not pytest's directory: that one is closed to the users as whom database servers run.
        self.directory = Path(tempfile.mkdtemp(prefix="test-clock-"))
        self.directory.chmod(0o755)
        self._file = self.directory / "offset"
        try:
            self._file.write_bytes(struct.pack("q", 0))
            self._file.chmod(0o644)
            self.library = self._compile()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process needs in its environment to look at this clock."""
        return {"LD_PRELOAD": str(self.library), FILE_VARIABLE: str(self._file)}

    @property
    def offset(self) -> timedelta:
        """How far the clock is ahead."""
        return timedelta(microseconds=struct.unpack("q", self._file.read_bytes())[0] / 1000)

    def set(self, seconds: float) -> None:
        """Let the clock be ahead by so many seconds."""
        with self._file.open("r+b", buffering=0) as file:  # the mapped file itself, not another in its place
            file.write(struct.pack("q", round(seconds * 1e9)))

    def step(self, **amount: float) -> None:
        """Move the clock by `timedelta(**amount)`."""
        self.set((self.offset + timedelta(**amount)).total_seconds())

    def _compile(self) -> Path:
        compiler = shutil.which("cc")
        if compiler is None:
            raise NoCompilerError("`cc` is not installed: clocks cannot be moved")
        source, library = self.directory / "steps.c", self.directory / "steps.so"
        source.write_text(_SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True, timeout=60)
        return library

    def close(self) -> None:
        """Remove the library and the file; processes that run keep the clock as it is."""
        shutil.rmtree(self.directory, ignore_errors=True)
