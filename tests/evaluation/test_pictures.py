"""sibo_lab/evaluation/pictures.py: what is drawn, and how it is written."""

import json
from types import SimpleNamespace

import numpy as np
from run_folders import run

from sibo_lab import files
from sibo_lab.evaluation import compare, pictures


def test_every_curve_is_drawn_plain_ones_dashed_and_in_the_colour_of_their_sibo(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(files, "write", lambda path, savefig: kept.append(savefig.__self__))
    names = ["frozen", "adapter", "adapter-sibo, λ 0.1", "adapter-sibo, λ 0.3", "lora", "lora-sibo", "full"]
    pictures.draw_similarity({name: [0.1, 0.2, 0.3] for name in names}, tmp_path / "s.png", "title")
    lines = {line.get_label().split(" (")[0]: line for line in kept[0].axes[0].get_lines()}
    assert list(lines) == names
    assert lines["adapter"].get_color() == lines["adapter-sibo, λ 0.3"].get_color() != lines["lora"].get_color()
    assert [lines[n].get_linestyle() for n in ("frozen", "lora", "lora-sibo")] == [":", "--", "-"]


def test_a_picture_is_written_whole_and_alone(tmp_path):
    pictures.draw_similarity({"frozen": [0.1, 0.5, 0.6], "lora-sibo": [0.1, 0.4, 0.5]}, tmp_path / "s.png", "title")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_the_scores_of_runs_are_drawn(tmp_path):
    run(tmp_path, "lora")
    pictures.draw_runs(compare.read([tmp_path]), tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_each_run_gets_the_losses_of_all_with_their_running_means_and_the_similarity(monkeypatch, tmp_path):
    kept = {}
    monkeypatch.setattr(files, "write", lambda path, savefig: kept.update({path: savefig.__self__}))
    folders = [run(tmp_path, method) for method in ("lora-sibo", "lora")]
    loss = np.arange(30, 0, -1.0)
    for folder in folders:
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"loss": x}) + "\n" for x in loss))
    results = [files.read_json(folder / "result.json") for folder in folders]
    pictures.draw_training([SimpleNamespace(out=str(folder)) for folder in folders], results)
    assert kept.keys() == {folder / name for folder in folders for name in ("curves.png", "similarity.png")}
    mean, every, *_ = kept[folders[0] / "curves.png"].axes[0].get_lines()
    assert list(every.get_xdata()) == list(range(1, 31)) and list(every.get_ydata()) == list(loss)
    assert mean.get_label() == "lora-sibo (mean of 10 steps)" and mean.get_ydata()[-1] == loss[-10:].mean()
    labels = [line.get_label().split(" (")[0] for line in kept[folders[1] / "similarity.png"].axes[0].get_lines()]
    assert labels == ["frozen", "lora-sibo", "lora"]
