"""settings.py: what each setting may be, and that everything else is one line which names it."""

import json
from dataclasses import FrozenInstanceError, asdict, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sibo
from sibo_lab import settings
from sibo_lab.settings import Settings

FIELDS = {f.name: f for f in fields(Settings)}
METHODS = ("full", "adapter", "adapter-sibo", "lora", "lora-sibo")


def test_the_defaults_are_a_lora_sibo_with_the_papers_places():
    assert asdict(Settings()) == {
        "method": "lora", "lam": 0.2, "targets": None, "sibo_at": None, "h0": None, "modules_to_save": None,
        "rank": 32, "alpha": 64.0, "dropout": 0.0, "bottleneck": 256, "side": "out", "skip": "mixed",
        "lam_by_depth": "even", "learn_lam": False, "frozen_too": False}
    assert sibo.Settings is Settings


@pytest.mark.parametrize("name,value", [
    ("method", "adapter"), ("lam", 0), ("lam", 0.0), ("lam", 0.999), ("targets", None), ("targets", "q_proj"),
    ("targets", ("q_proj", "up_proj")), ("targets", ["q_proj"]), ("sibo_at", "both"), ("sibo_at", ["up_proj"]),
    ("h0", None), ("h0", "embed"), ("modules_to_save", ["score"]), ("modules_to_save", ()), ("rank", 1),
    ("alpha", -3), ("alpha", 0.5), ("dropout", 0), ("dropout", 1e-6), ("dropout", 0.99), ("bottleneck", 4096),
    ("side", "parallel"), ("skip", "plain"), ("lam_by_depth", "rising"), ("learn_lam", True), ("frozen_too", True)])
def test_what_a_setting_may_be(name, value):
    assert getattr(Settings(**{name: value}), name) == value


@pytest.mark.parametrize("name,value,says", [
    ("method", "prefix", "method: expected lora or adapter, got 'prefix'"), ("method", None, "method: .*, got None"),
    ("lam", 1, r"lam: expected in \[0, 1\), got 1"), ("lam", -0.1, "lam: .*, got -0.1"),
    ("lam", "0.2", "lam: .*, got '0.2'"),
    ("lam", float("nan"), "lam: .*, got nan"), ("lam", True, "lam: .*, got True"), ("lam", None, "lam: .*, got None"),
    ("rank", 0, "rank: expected at least 1, got 0"), ("rank", 4.0, "rank: .*, got 4.0"),
    ("rank", True, "rank: .*, got True"), ("rank", float("inf"), "rank: .*, got inf"),
    ("bottleneck", -1, "bottleneck: expected at least 1, got -1"),
    ("alpha", float("inf"), "alpha: .*, got inf"), ("alpha", -2e9, "alpha: .*, got -2000000000.0"),
    ("dropout", 1.0, r"dropout: expected in \[0, 1\), got 1.0"),
    ("dropout", 1e-17, "dropout: expected 0 or at least 1e-6 .*, got 1e-17"),
    ("side", "up", "side: expected out or in or parallel, got 'up'"), ("side", [], r"side: .*, got \[\]"),
    ("skip", "none", "skip: expected mixed or plain, got 'none'"),
    ("lam_by_depth", "up", "lam_by_depth: expected even or rising or falling or first-third or last-third, got 'up'"),
    ("learn_lam", 1, "learn_lam: expected False or True, got 1"), ("frozen_too", "yes", "frozen_too: .*, got 'yes'"),
    ("targets", 3, "targets: expected a name, or several, got 3"),
    ("targets", ["q_proj", 3], r"targets: .*, got \['q_proj', 3\]"),
    ("sibo_at", {"up_proj": 1}, "sibo_at: expected a name, or several, got"),
    ("h0", ["embed"], r"h0: expected a name, got \['embed'\]"), ("h0", 0, "h0: expected a name, got 0"),
    ("modules_to_save", 3, "modules_to_save: expected a name, or several, got 3")])
def test_what_a_setting_may_not_be_is_one_line_that_names_it(name, value, says):
    with pytest.raises(ValueError, match=f"^{says}") as error:
        Settings(**{name: value})
    assert "\n" not in str(error.value)


def test_a_learned_lambda_has_to_start_above_0():
    with pytest.raises(ValueError, match=r"lam: expected above 0 where it is learned .*, got 0"):
        Settings(lam=0.0, learn_lam=True)


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                      lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2),
                      max_leaves=4)


@given(st.sampled_from(list(FIELDS)), values)
def test_any_value_is_taken_or_refused_in_one_line_that_names_the_setting(name, value):
    try:
        settings.check(FIELDS[name], value)
    except ValueError as error:
        assert str(error).startswith(f"{name}: expected ") and "\n" not in str(error) and len(str(error)) < 400
    else:
        assert json.loads(json.dumps(value)) == value  # it can be saved, and is the same when it comes back
        assert type(value) in (str, int, float, bool, list, type(None))


def test_settings_do_not_change_once_made():
    with pytest.raises(FrozenInstanceError):
        Settings().lam = 0.5


def test_an_unknown_setting_is_an_error():
    with pytest.raises(TypeError, match="colour"):
        Settings(colour="red")


def test_each_setting_says_which_methods_use_it():
    plain, sibos, loras, adapters = METHODS[1:], ("adapter-sibo", "lora-sibo"), METHODS[3:], METHODS[1:3]
    used = {name: tuple(m for m in METHODS if f.metadata["used_by"] in m) for name, f in FIELDS.items()}
    assert used == {"method": METHODS, "lam": sibos, "targets": plain, "sibo_at": sibos, "h0": METHODS,
                    "modules_to_save": plain, "rank": loras, "alpha": loras, "dropout": loras, "bottleneck": adapters,
                    "side": adapters, "skip": ("adapter-sibo",), "lam_by_depth": sibos, "learn_lam": sibos,
                    "frozen_too": ("lora-sibo",)}
