"""Opens exported folders as a stranger would: with torch and transformers, without this project. Run by itself:
python -P tests/publish/elsewhere.py FOLDER ..., each with an expected.pt (see test_folder.py) beside its weights."""

import importlib.util
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, pipeline


def check(folder: Path) -> float:
    """The largest difference of any logit; AssertionError if something else is not as expected."""
    e = torch.load(folder / "expected.pt", weights_only=True)
    kind = getattr(transformers, e["auto"])
    m = kind.from_pretrained(folder, trust_remote_code=True).eval()
    ids, mask = e["ids"], e["mask"]
    differences = [difference(m, e)]
    if e["plain"]:
        assert type(m).__module__.startswith("transformers.models."), "a plain model needs no code of ours"
    else:
        refused(lambda: kind.from_pretrained(folder, trust_remote_code=False))
        refused(lambda: type(m).__bases__[0].from_pretrained(folder))
    if "CausalLM" in e["auto"]:
        for beams, expected in e["answers"].items():
            got = m.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=beams, do_sample=False,
                             eos_token_id=2, pad_token_id=0)
            assert torch.equal(got, expected[:, :got.shape[1]]), f"{beams} beams"
        with torch.no_grad():
            whole, cached = m(ids[:1]).logits, m(ids[:1, :3], use_cache=True)
            rest = m(ids[:1, 3:], past_key_values=cached.past_key_values).logits
        differences += [float((whole - torch.cat((cached.logits, rest), 1)).abs().max())]
    m.save_pretrained(folder / "again")
    differences.append(difference(kind.from_pretrained(folder / "again", trust_remote_code=True).eval(), e))
    assert gradients(m, e, False) == gradients(m, e, True) != {}, "checkpointed blocks have other gradients"
    if e["text"]:
        opened(folder, e, ids)
    return max(differences)


def difference(m: torch.nn.Module, e: dict) -> float:
    with torch.no_grad():
        out = m(e["ids"], attention_mask=e["mask"])
    got = out.logits if "logits" in out else out.last_hidden_state
    seen = e["mask"].bool() if got.dim() == 3 else slice(None)
    return float((got - e["out"])[seen].abs().max())


def refused(load) -> None:
    try:
        load()
    except (OSError, ValueError):
        return
    raise AssertionError("expected to be refused without its code, got another model")


def gradients(m: torch.nn.Module, e: dict, checkpointed: bool) -> dict[str, list]:
    """Of two passes and one backward pass: each has its own h0."""
    m.zero_grad()
    m.train()
    if checkpointed:
        m.gradient_checkpointing_enable({"use_reentrant": False})
    outs = [m(ids, attention_mask=e["mask"])[0] for ids in (e["ids"], e["ids"].flip(0))]
    sum((out[e["mask"].bool()] if out.dim() == 3 else out).square().mean() for out in outs).backward()
    m.eval().gradient_checkpointing_disable()
    return {n: p.grad.tolist() for n, p in m.named_parameters() if p.grad is not None}


def opened(folder: Path, e: dict, ids: torch.Tensor) -> None:
    t = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert t(e["text"])["input_ids"] == e["text_ids"]
    task = "text-generation" if "CausalLM" in e["auto"] else "text-classification"
    said = pipeline(task, model=str(folder), trust_remote_code=True)(e["text"])
    assert said[0].get("generated_text", said[0].get("label"))


if __name__ == "__main__":
    assert not importlib.util.find_spec("sibo") and not importlib.util.find_spec("sibo_lab")
    torch.manual_seed(0)
    for name in sys.argv[1:]:
        print(f"{name}: transformers {transformers.__version__}, largest difference {check(Path(name)):.1e}")
