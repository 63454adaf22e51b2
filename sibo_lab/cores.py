"""Leaves cores that other processes keep busy to them. OpenMP's threads wait for each other by spinning: where two of
them land on one core, beside another process, a step takes twenty times as long."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from time import monotonic, sleep

import torch
from torch import nn

from sibo_lab import fast

PAUSE = 0.25  # seconds between looks: Linux counts the time of processors in hundredths


def times() -> tuple[float, float]:
    """Seconds that all processes, and this one, have kept processors busy (Linux)."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, *_ = map(int, file.readline().split()[1:])
    own = os.times()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), own.user + own.system


class Sharing:
    """How many threads to use, of at most `most`: fewer as soon as others take half a core, more once they take less
    than a quarter."""

    def __init__(self, most: int, cores: int):
        self.most = self.threads = most
        self.cores, self.then, self.busy = cores, monotonic(), times()

    def look(self) -> int:
        now = monotonic()
        if (passed := now - self.then) >= PAUSE:
            busy = times()
            others = ((busy[0] - self.busy[0]) - (busy[1] - self.busy[1])) / passed
            at_least, at_most = (max(1, int(self.cores - others + spare)) for spare in (0.25, 0.5))
            self.threads = min(self.most, max(at_least, min(self.threads, at_most)))
            self.then, self.busy = now, busy
        return self.threads


@cache
def say_once(most: int) -> None:
    """The first change in a process; training and scoring follow each other in one."""
    print(f"other processes are busy: using {torch.get_num_threads()} of {most} threads until they are not "
          "(OMP_NUM_THREADS sets a fixed number)", file=sys.stderr)


@contextmanager
def shared(m: nn.Module) -> Iterator[None]:
    """Inside, each forward pass of `m` uses as many threads as cores are free, and the first change is said on stderr.
    Not where OMP_NUM_THREADS says how many, on GPUs, where blocks are compiled (for one number of threads), and outside
    of Linux."""
    most, elsewhere = torch.get_num_threads(), next(m.parameters()).device.type != "cpu" or sys.platform != "linux"
    if elsewhere or "OMP_NUM_THREADS" in os.environ or most == 1 or fast.is_compiled(m):
        yield
        return
    sharing = Sharing(most, len(os.sched_getaffinity(0)))
    sleep(PAUSE)  # or the first pass, with all threads beside a busy process, may take half a minute

    def adapt(*_) -> None:
        if (threads := sharing.look()) != torch.get_num_threads():
            torch.set_num_threads(threads)
            say_once(most)

    hook = m.register_forward_pre_hook(adapt)
    try:
        yield
    finally:
        hook.remove()
        torch.set_num_threads(most)
