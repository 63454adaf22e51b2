"""Fresh processes, and the busy one beside them."""

import os
import subprocess

import pytest

from sibo_lab.tools import bench_large, bench_process


def test_a_fresh_process_returns_its_figures_and_one_that_dies_is_one_line():
    found = bench_process.in_fresh_process(bench_large.process_memory)
    assert found["peak"] >= found["anonymous"] > 0
    with pytest.raises(OSError, match="expected figures, got a process that died") as e:
        bench_process.in_fresh_process(os._exit, 9)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_busy_process_has_the_lowest_priority_and_ends_even_where_the_measurement_fails(monkeypatch, pinned):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kw: started.append(popen(*args, **kw)) or started[-1])
    with pytest.raises(ZeroDivisionError), bench_process.busy(pinned):
        assert started[0].poll() is None
        _ = 1 / 0
    assert started[0].returncode == -9
    assert started[0].args[:3] == ["nice", "-n", "19"] and ("sched_setaffinity" in started[0].args[-1]) == pinned


def test_a_command_that_fails_is_one_line_with_what_it_said():
    with pytest.raises(OSError, match="train.py --lam 2: expected exit code 0, got 2: error: .*lam") as e:
        bench_process.train_py("--lam", "2")
    assert "\n" not in str(e.value)


def test_memory_that_is_linear_in_the_length_has_exponent_1_and_one_that_is_square_misses_the_goal(monkeypatch):
    monkeypatch.setattr(bench_process, "smollm2", lambda: bench_process.Case(None))
    monkeypatch.setattr(bench_process, "children", lambda *_: {"GB": [[1.0], [2.0]]})
    monkeypatch.setattr(bench_process, "weights_gb", lambda case: 0.5)
    for power, met in ((1, True), (2, False)):
        monkeypatch.setattr(bench_process, "in_fresh_process",
                            lambda *args, power=power: {"GB": 0.5 + 1e-6 * args[-1] ** power})
        *_, last = bench_process.memory()
        assert (last.ours, last.met) == (pytest.approx(power), met)
