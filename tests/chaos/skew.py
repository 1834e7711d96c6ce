"""Another wall clock for a whole process: a library for LD_PRELOAD, compiled where there is a C compiler.

It shifts what C code and Python learn of CLOCK_REALTIME (`time.time`, `datetime.now`, log lines, Celery's ETAs, the
drivers' timeouts); it leaves CLOCK_MONOTONIC, file times and the kernel's own timers alone, and knows no drift.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Final

OFFSET_VARIABLE: Final = "CHAOS_CLOCK_OFFSET"

_SOURCE: Final = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long offset(void) {
  static long seconds; static int known;
  if (!known) { const char *text = getenv("CHAOS_CLOCK_OFFSET"); seconds = text ? atol(text) : 0; known = 1; }
  return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
  int failed = syscall(SYS_clock_gettime, clock, at);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) at->tv_sec += offset();
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


class NoCompilerError(Exception):
    """There is no C compiler here."""


def build_library(directory: Path) -> Path:
    """The path of the library, compiled into `directory`."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise NoCompilerError("`cc` is not installed: clocks cannot be shifted")
    source, library = directory / "skew.c", directory / "skew.so"
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True, timeout=60)
    return library


def environment(library: Path, seconds: int) -> dict[str, str]:
    """What a process needs in its environment for its clock to be `seconds` ahead."""
    return {"LD_PRELOAD": str(library), OFFSET_VARIABLE: str(seconds)}
