"""recipes.py: the paper's and the official scripts' numbers, and a run as one flat dict."""

import json
from dataclasses import fields

import pytest

from sibo_lab.settings import Settings
from sibo_lab.training import recipes


@pytest.mark.parametrize(("family", "kind", "method", "lam"), [
    ("llama", "arithmetic", "lora-sibo", 0.1), ("llama", "commonsense", "adapter-sibo", 0.1),
    ("gptj", "arithmetic", "lora-sibo", 0.1), ("gptj", "arithmetic", "adapter-sibo", 0.3),
    ("gptj", "commonsense", "lora-sibo", 0.3), ("gptj", "commonsense", "adapter-sibo", 0.1),
])
def test_the_papers_lambda_is_the_recipes(family, kind, method, lam):
    r = recipes.run_of(method, **recipes.recipe(family, kind, method))
    assert (r.lr, r.batch_size, r.micro_batch_size, r.epochs, r.warmup, r.cutoff, r.train_on_inputs) == (
        3e-4, 16, 4, 3.0, 100, 256, True)
    s = r.settings
    assert (s.lam, s.rank, s.alpha, s.dropout, s.bottleneck) == (lam, 32, 64.0, 0.05, 256)


@pytest.mark.parametrize("method", recipes.METHODS)
def test_config_json_holds_every_setting_in_one_flat_object_and_makes_the_same_run_again(method):
    run = recipes.run_of(method, lr=1e-3, rank=4)
    config = json.loads(json.dumps(run.config()))
    assert config.keys() == {f.name for f in (*fields(recipes.Run), *fields(Settings))} - {
        "settings", "h0", "modules_to_save"}
    assert recipes.run_of(**config | {"test": tuple(config["test"])}) == run


def test_full_fine_tuning_has_no_settings_and_the_plain_methods_no_lam():
    assert recipes.run_of("full", lam=0.3, rank=4).settings is None
    assert recipes.run_of("lora", lam=0.3).settings.lam == 0.0


def test_the_plain_counterpart_differs_in_h0_alone():
    run = recipes.run_of("lora-sibo", lam=0.3, learn_lam=True, frozen_too=True, rank=4, seed=7, out="runs/a")
    assert run.plain == recipes.run_of("lora", rank=4, seed=7, out="runs/a-plain")
