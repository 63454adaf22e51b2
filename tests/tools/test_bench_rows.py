"""The table's arithmetic, the turns that sides take, and the page that shows it."""

import math
import re

import pytest
import torch

from sibo_lab.tools import bench_rows


def test_the_ratio_is_the_median_of_pairs_and_its_interval_that_of_a_median():
    row = bench_rows.paired("x", "s", [2.0, 4.0, 9.0], [1.0, 4.0, 3.0], goal=2.5)
    assert (row.ours, row.peer, row.ratio, row.met, row.interval) == (4.0, 3.0, 2.0, True, None)
    low, high = bench_rows.paired("x", "s", [float(i) for i in range(1, 31)], [1.0] * 30).interval
    outside = sum(math.comb(30, i) for i in [*range(int(low)), *range(int(high), 31)]) / 2**30
    assert 0.04 < outside < 0.05  # the median lies below the 10th of 30, or above the 21st


@pytest.mark.parametrize(("ratio", "unit", "met"), [(2.0, "tokens/s", True), (1.9, "tokens/s", False),
                                                    (2.0, "s", True), (2.1, "GB", False)])
@pytest.mark.parametrize("peer", [[1.0], []])
def test_a_goal_bounds_speed_from_below_and_cost_from_above_with_a_peer_or_without(ratio, unit, met, peer):
    assert bench_rows.paired("x", unit, [ratio], peer, 2.0).met is met


def test_pairs_of_which_one_is_missing_are_refused():
    with pytest.raises(ValueError):
        bench_rows.paired("x", "s", [1.0, 2.0], [1.0])


def test_what_was_not_measured_says_so():
    row = bench_rows.paired("x", "s", [], [], 1.3)
    line = bench_rows.table([row]).splitlines()[1]
    assert row.met is None
    assert line.count("not measured") == 2
    assert line.rstrip().endswith("≤ 1.3")


def test_a_row_says_its_threads_and_dtypes():
    row = bench_rows.paired("x", "s", [1.0])
    assert (row.threads, row.dtype) == (torch.get_num_threads(), bench_rows.named(bench_rows.DTYPE))
    row = bench_rows.paired("x", "s", [1.0], [2.0], threads=3, dtype="bfloat16", peer_as="float32, merged")
    assert re.match("x +3  bfloat16; peer: float32, merged +1", bench_rows.table([row]).splitlines()[1])


def test_all_sides_take_one_input_before_the_next_and_another_side_begins_each_time():
    seen = []
    found = bench_rows.in_turn([lambda x: seen.append(("a", x)) or x, lambda x: seen.append(("b", x)) or -x], [1, 2, 3])
    assert found == [[1, 2, 3], [-1, -2, -3]]
    assert seen == [("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 3), ("a", 3)]


def test_a_clock_warms_every_side_up_with_the_first_input():
    seen = []
    found = bench_rows.clocked([lambda x: seen.append(("a", x)), lambda x: seen.append(("b", x))], [1, 2])
    assert [len(side) for side in found] == [2, 2] and seen[:2] == [("b", 1), ("a", 1)] and len(seen) == 6


def test_a_page_has_each_groups_table_between_its_markers_and_keeps_the_rest():
    page = "# A\n<!-- bench: speed -->\nold\n<!-- end -->\nkept\n<!-- bench: none -->\nold\n<!-- end -->\n"
    rows = [bench_rows.paired(name, "s", [1.0], [4.0], 2.0, threads=2, dtype="float32", group="speed") for name in "xy"]
    filled = bench_rows.filled(page, rows)
    assert "| x | 2 | float32 | 1 | 4 | s | 0.250 | ≤ 2 | yes |\n| y |" in filled and "old" not in filled
    assert "\nkept\n<!-- bench: none -->\n(not measured yet)\n<!-- end -->\n" in filled
    assert bench_rows.filled(filled, rows) == filled
