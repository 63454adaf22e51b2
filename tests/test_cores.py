"""Threads beside other processes: what /proc/stat would say is given, and nothing is timed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sibo_lab import cores


class Machine:
    """A clock, and what processors did: `others` cores are busy with other processes, `own` with this one."""

    def __init__(self, monkeypatch):
        self.now = self.all = self.own = self.others = 0.0
        monkeypatch.setattr(cores, "monotonic", lambda: self.now)
        monkeypatch.setattr(cores, "times", lambda: (self.all, self.own))
        monkeypatch.setattr(cores, "sleep", lambda seconds: self.goes_on(seconds, self.others, own=0.0))

    def goes_on(self, seconds: float, others: float, own: float = 1.0) -> None:
        self.now += seconds
        self.all += seconds * (others + own)
        self.own += seconds * own


@pytest.fixture
def machine(monkeypatch):
    cores.say_once.cache_clear()
    return Machine(monkeypatch)


def test_a_busy_core_is_left_and_taken_again(machine):
    sharing = cores.Sharing(2, 2)
    found = []
    for others in (0.0, 1.0, 1.0, 0.4, 0.0, 0.4, 0.6):
        machine.goes_on(1.0, others)
        found.append(sharing.look())
    assert found == [2, 1, 1, 1, 2, 2, 1]  # at 0.4 all stays as it is


def test_nothing_changes_between_two_looks(machine):
    sharing = cores.Sharing(2, 2)
    machine.goes_on(cores.PAUSE / 2, others=2.0)
    assert sharing.look() == 2
    machine.goes_on(cores.PAUSE / 2, others=2.0)
    assert sharing.look() == 1


@given(st.integers(1, 64), st.integers(1, 64), st.lists(st.floats(0, 80), max_size=8))
def test_at_least_one_thread_at_most_those_asked_for_and_no_more_than_cores_are_free(most, n, loads):
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch)
        sharing = cores.Sharing(most, n)
        for others in loads:
            machine.goes_on(1.0, others)
            threads = sharing.look()
            assert 1 <= threads <= most
            assert threads == 1 or threads <= n - others + 0.5 + 1e-6


def test_each_forward_pass_looks_threads_come_back_and_a_process_says_so_once(machine, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: used.append(n))
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1})
    used, m = [2], nn.Linear(2, 2)
    for _ in ("training", "scoring"):  # all that a command does says it once
        with cores.shared(m):
            for others in (0.0, 1.0, 0.0, 1.0):
                machine.goes_on(1.0, others)
                m(torch.zeros(1, 2))
        assert not m._forward_pre_hooks
    assert used == [2, 1, 2, 1, 2] + [1, 2, 1, 2]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "using 1 of 2 threads" in err


def test_the_first_pass_too_leaves_a_core_that_is_busy(machine, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: used.append(n))
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1})
    used, machine.others = [2], 1.0
    m = nn.Linear(2, 2)
    with cores.shared(m):
        m(torch.zeros(1, 2))
        assert used == [2, 1]


def test_a_number_that_the_user_fixed_stays(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    m = nn.Linear(2, 2)
    with cores.shared(m):
        assert not m._forward_pre_hooks


def test_linux_counts_at_least_this_processes_time():
    before = cores.times()
    sum(i * i for i in range(3_000_000))
    after = cores.times()
    assert after[1] > before[1]
    assert after[0] - before[0] >= after[1] - before[1] - 0.03  # in hundredths
