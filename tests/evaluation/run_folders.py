"""Run folders as train.py leaves them, without the training."""

import json
import shlex

from sibo_lab.training import recipes


def run(folder, method="lora", seed=0, score=0.5, right=None, lost=None, **settings):
    """A folder in `folder`; for each test example whether its answer was `right`, or what it cost: `lost`."""
    config = recipes.run_of(method, seed=seed, **{"lam": 0.2 if "sibo" in method else 0.0} | settings).config()
    folder = folder / f"{method}-{seed}-{len(list(folder.iterdir()))}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps({
        "backbone": "tiny", "method": method, "task": "words", "metric": "accuracy", "score": score, "parts": {},
        "loss": None if lost is None else sum(lost) / len(lost), "similarity": 0.5, "trainable_parameters": 1000,
        "scored_on": "test",
        "similarity_per_layer": [0.1, 0.4, 0.5], "baseline_similarity_per_layer": [0.1, 0.5, 0.6],
        "command": f"python train.py --data-dir {shlex.quote(config['data_dir'] or '')} --lr 1 --out={config['out']} "
                   f"--results {folder}"}))
    records = [{"right": bool(r)} for r in (() if right is None else right)] or [{"loss": x} for x in lost or ()]
    if right is not None or lost is not None:
        lines = [json.dumps({"task": "words"} | record) for record in records]
        (folder / "answers.jsonl").write_text("\n".join(lines))
    return folder
