"""The method's settings, one object from the command line to the line that mixes h0."""

from dataclasses import Field, dataclass, field, fields
from math import inf

from sibo_lab.files import quoted

Names = str | tuple[str, ...] | None


def of(default: object, *allowed: object, used_by: str = "") -> Field:
    """A field of Settings: its words or its range; `used_by` is a part of the name of each method that uses it."""
    return field(default=default, metadata={"allowed": allowed, "used_by": used_by})


@dataclass(frozen=True)
class Settings:
    """What `sibo.inject` takes, and what is saved with the trained weights. None: the paper's choice for the model; of
    h0 the input of each stack's first block, of modules_to_save the heads that are known by name."""

    method: str = of("lora", "lora", "adapter")
    lam: float = of(0.2, 0, 1, used_by="-sibo")  # λ; 0: the plain method, h0 is neither captured nor needed
    targets: Names = of(None, used_by="a")  # by the last dotted segments of their names, * for any one segment
    sibo_at: Names = of(None, used_by="-sibo")  # which of them get h0: attn, ffn, both, or names
    h0: str | None = of(None)  # another module whose input is h0 (an embedding: whose output)
    modules_to_save: Names = of(None, used_by="a")  # trained whole, and saved: the new head of a task
    rank: int = of(32, 1, inf, used_by="lora")
    alpha: float = of(64.0, -1e9, 1e9, used_by="lora")  # s = alpha / rank
    dropout: float = of(0.0, 0, 1, used_by="lora")  # on the input of the low-rank path
    bottleneck: int = of(256, 1, inf, used_by="adapter")
    side: str = of("out", "out", "in", "parallel", used_by="adapter")  # of the module (parallel: He et al. 2022)
    skip: str = of("mixed", "mixed", "plain", used_by="adapter-sibo")  # h̃ + …, Eq. (4), or h + …
    lam_by_depth: str = of("even", "even", "rising", "falling", "first-third", "last-third", used_by="-sibo")
    learn_lam: bool = of(False, False, True, used_by="-sibo")  # λ = sigmoid of one number per module (Section 7)
    frozen_too: bool = of(False, False, True, used_by="lora-sibo")  # the frozen weight sees h̃ as well (Table 6)

    def __post_init__(self):
        for f in fields(self):
            check(f, getattr(self, f.name))
        if self.learn_lam and not self.lam:
            raise ValueError("lam: expected above 0 where it is learned (a sigmoid never starts at 0), got 0")
        if self.lam_by_depth in ("rising", "falling") and self.lam >= 0.5:
            raise ValueError(f"lam: expected below 0.5 to go up to twice that, {self.lam_by_depth}, got {self.lam}")
        if 0 < self.dropout < 1e-6:
            raise ValueError(f"dropout: expected 0 or at least 1e-6 (below, 1 − p is 1), got {self.dropout}")

    def share(self, i: int, n: int) -> float:
        """λ of the i-th of n blocks that get h0, as a multiple of `lam`; of one alone, `lam`."""
        x = i / (n - 1) if n > 1 else 0.5
        return {"even": 1.0, "rising": 2 * x, "falling": 2 - 2 * x, "first-third": float(3 * i < n),
                "last-third": float(3 * (n - 1 - i) < n)}[self.lam_by_depth]


def check(f: Field, value: object) -> None:
    """ValueError unless a field of Settings allows `value`, which may come from a file or a command line."""
    allowed = f.metadata["allowed"]
    if not allowed:
        several = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        fits = isinstance(value, str | None) or several and f.type == Names
        expected = "a name, or several" if f.type == Names else "a name"
    elif isinstance(f.default, str | bool):
        fits, expected = type(value) is type(f.default) and value in allowed, " or ".join(map(str, allowed))
    else:
        low, high = allowed
        fits = isinstance(value, (int, type(f.default))) and not isinstance(value, bool) and low <= value < high
        expected = f"in [{low:g}, {high:g})" if high < inf else f"at least {low}"
    if not fits:
        raise ValueError(f"{f.name}: expected {expected}, got {quoted(value)}")
