"""The rows of the scaling, and their picture."""

from test_bench_large import TINY

from sibo_lab.tools import bench_large, bench_scaling, bench_speed


def test_every_scale_has_its_rows_at_its_threads_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_scaling, "SCALES", {"batch": (1, 2), "length": (4, 8)})
    bench_large.write_shape(TINY, tmp_path)
    with bench_speed.threads(2):
        rows = list(bench_scaling.scaling(bench_speed.Case(tmp_path)))
    assert {(r.name, r.threads) for r in rows} == {
        (f"{work}, {axis} {x}", x if axis == "threads" else 2) for work in ("training", "decoding")
        for axis, values in (("batch", (1, 2)), ("length", (4, 8)), ("threads", (1, 2))) for x in values}
    assert all(r.ours > 0 and r.unit == "tokens/s" and r.peer is None for r in rows if r.name.startswith("training"))
    bench_scaling.draw_scaling(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
