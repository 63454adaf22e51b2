"""Multiple choice as task files of EleutherAI's lm-evaluation-harness (lm_eval), which scores an exported model on what
eval.py asks."""

import json
from collections.abc import Sequence
from pathlib import Path

from sibo_lab import files
from sibo_lab.data import batch, tasks


def document(example: tasks.Example, tokenizer=None, protocol: str = "clean") -> dict:
    """A question for lm_eval: prompt, choices, and which is right. ValueError for a prompt that ends in a space.

    LEAD is part of the prompt: lm_eval moves white space from a prompt's end to the answer, and where a tokenizer has
    one token for ":" and a line feed, as Llama 3's, that loses the line feed."""
    prompt = batch.prompt_of(example, tokenizer, protocol)
    if prompt.endswith((" ", "\t")):
        raise ValueError(f"--protocol {protocol}: expected a prompt without a space at its end, got one: lm_eval "
                         "joins it to the answer, eval.py does not; use --protocol clean")
    return {"prompt": prompt + tasks.LEAD, "choices": example.choices, "gold": example.choices.index(example.answer)}


def write(folder: Path, name: str, documents: Sequence[dict], about: dict) -> None:
    """sibo_NAME.jsonl and .yaml, a task for lm_eval's --include_path; `about` is its metadata."""
    data, file = (folder.resolve() / f"sibo_{name}.{end}" for end in ("jsonl", "yaml"))
    task = {"task": f"sibo_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "output_type": "multiple_choice", "num_fewshot": 0, "doc_to_text": "prompt",
            "target_delimiter": " ", "doc_to_choice": "choices", "doc_to_target": "gold",
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                            for metric in ("acc", "acc_norm")], "metadata": {"version": 1} | about}
    files.write(data, "".join(json.dumps(d) + "\n" for d in documents))
    files.write(file, json.dumps(task, indent=2) + "\n")  # JSON is YAML
