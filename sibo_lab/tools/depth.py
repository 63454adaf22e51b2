"""Does mixing h0 into every block help a model that is trained from nothing, and does it help the more, the deeper it
is? The paper's explanation, tried where nothing is frozen: small LLaMAs of one width and 4 to 32 blocks, on the same
text and steps, against other remedies. `python -m sibo_lab study depth --data-dir DATA`."""

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eval as evaluation
import model
from sibo_lab import files
from sibo_lab.backbone import tokenizer
from sibo_lab.data import batch, readers, tasks
from sibo_lab.evaluation import compare, metrics, pictures
from sibo_lab.training import loop, remedies, resume, run_folder
from sibo_lab.training.recipes import Run, run_of

WIDTH, T, WORDS = 64, 128, 4096  # tokens of a row; distinct tokens, the rarest of which are one
BLOCKS = (4, 8, 16, 32)
TEXT = ("gsm8k", "mawps", "cola", "mrpc", "rte", "stsb")
HELD_OUT = 256  # rows
LAM = 0.1
VARIANTS = {  # h0's λ and whether it is learned, stochastic depth, the weight of the similarity loss
    "none": (0.0, False, 0.0, 0.0), "h0": (LAM, False, 0.0, 0.0), "h0, λ learned": (LAM, True, 0.0, 0.0),
    "stochastic depth": (0.0, False, 0.1, 0.0), "stochastic depth and h0": (LAM, False, 0.1, 0.0),
    "similarity loss": (0.0, False, 0.0, 0.1), "similarity loss and h0": (LAM, False, 0.0, 0.1)}
EVERYWHERE, COMPARED_AT = tuple(VARIANTS)[:3], 16  # the other remedies: at one depth


@dataclass
class Trained:
    """One model, as saved in its result.json."""

    variant: str
    blocks: int
    seed: int
    losses: list[float]  # mean over the tokens of each held-out row, in nats
    similarity_per_layer: list[float]  # of the first 64 held-out rows
    lam: list[float]  # of each block but the first
    loss_per_quarter: list[float]  # of the training steps
    command: str
    sha256: dict[str, str] = field(default_factory=dict)  # of the rows; older ones do not tell


def corpus(data_dir: Path, backbone: str) -> tuple[list[batch.Row], list[batch.Row]]:
    """Rows of T tokens to train on, and held out: GSM8K's and MAWPS's problems and GLUE's sentences, each once, in the
    order of their hashes, the backbone's tokens with all but the most common as one."""
    found = [row for name in TEXT for row in readers.load(tasks.task(name), "train", data_dir)]
    texts = {f"{e.instruction}\n{e.output}" for e in found if isinstance(e, tasks.Example)}
    texts |= {text for s in found if isinstance(s, tasks.Sentence) for text in (s.text, s.pair) if text}
    t = tokenizer.from_pretrained(backbone)
    ids = [i for text in sorted(texts, key=lambda text: batch.digest([text])) for i in (*t.encode(text), t.eos_id)]
    number = {i: n for n, (i, _) in enumerate(Counter(ids).most_common(WORDS - 1))}
    ids = [number.get(i, WORDS - 1) for i in ids]
    rows = [batch.Row(ids[i:i + T], ids[i:i + T]) for i in range(0, len(ids) - T + 1, T)]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def build(blocks: int, seed: int) -> nn.Module:
    """A LLaMA with weights drawn as GPT-2's: N(0, 0.02²), what writes into the stream 1/√(2 blocks) of that."""
    m = model.build({"model_type": "llama", "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": blocks,
                     "num_attention_heads": 4, "intermediate_size": 176, "max_position_embeddings": T})
    torch.manual_seed(seed)
    for name, p in list(m.named_parameters()):
        std = 0.02 / (2 * blocks) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        model.put(m, name, torch.randn(p.shape) * std if p.ndim > 1 else torch.ones(p.shape))
    return m.eval()


def prepare(m: nn.Module, variant: str) -> nn.Module:
    lam, learned, rate, weight = VARIANTS[variant]
    if lam:
        remedies.InitialTokens(m, lam, learned)
    if rate:
        remedies.stochastic_depth(m, rate)
    if weight:
        remedies.SimilarityLoss(m, weight, evaluation.similarities)
    return m


@torch.no_grad()
def losses(m: nn.Module, rows: list[batch.Row]) -> list[float]:
    found = []
    for start in range(0, len(rows), 16):
        ids = torch.tensor([row.ids for row in rows[start:start + 16]])  # (B, T)
        each = F.cross_entropy(m(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        found += each.view(len(ids), -1).mean(1).tolist()
    return found


def train(variant: str, blocks: int, run: Run, rows: list[batch.Row], held: list[batch.Row], resuming: bool) -> Trained:
    """Trains a model, unless its result is there, and scores it."""
    out, digests = Path(run.out), {"train": batch.digest(rows), "validation": batch.digest(held)}
    if done := run_folder.claim(run, resuming):
        run_folder.require_same_data(run, done, digests)
        return Trained(**done)
    with resume.lock(out):
        files.write(out / "config.json", json.dumps(run.config(), indent=2) + "\n")
        m = prepare(build(blocks, run.seed), variant)
        loop.fit(m, rows, 0, run, every=resume.SaveEvery(), resuming=resuming)
        h0 = getattr(m, "initial_tokens", None)
        found = Trained(variant, blocks, run.seed, [round(x, 5) for x in losses(m, held)],
                        [round(x, 4) for x in evaluation.layer_similarities(m, held[:64])],
                        [round(x, 4) for x in h0.lam_logit.sigmoid().tolist()] if h0 else [],
                        [round(x, 4) for x in compare.quarters(compare.losses(out))], run_folder.command(), digests)
        files.write(out / "result.json", json.dumps(asdict(found)) + "\n")
    return found


def study(args: Namespace, file: str) -> list[str]:
    if args.lr and len(args.lr) > 1:
        raise ValueError(f"--lr: expected one for all models, got {','.join(map(str, args.lr))}")
    rows, held = corpus(tasks.data_dir(args.data_dir), args.backbone)
    found = []
    for seed in args.seed or (0,):
        for blocks in BLOCKS:
            for variant in VARIANTS if blocks == COMPARED_AT else EVERYWHERE:
                name = f"{variant.replace(', λ ', '-').replace(' ', '-')}-{blocks}-seed{seed}"
                run = run_of("full", backbone=args.backbone, steps=args.steps or 500, warmup=0.1,
                             lr=args.lr[0] if args.lr else 2e-3, batch_size=args.batch_size or 8,
                             micro_batch_size=args.batch_size or 8, seed=seed, dtype="float32",
                             out=f"{args.out or 'runs/depth'}/{name}")
                found.append(train(variant, blocks, run, rows, held, args.resume))
    results = Path(file).with_name("depth")  # of no backbone and task
    files.write(results.with_suffix(".jsonl"), "".join(
        json.dumps(asdict(x) | {"command": compare.without_folders(x.command)}) + "\n" for x in found))
    draw(found, results.with_suffix(".png"))
    return [f"{variant}, {blocks} blocks: {np.mean(lost):.3f}" + (
        f", against none {d.mean:+.4f} ± {d.half:.4f} (could show {d.could_show:.4f})" if d else "")
        for variant, blocks, lost, d in table(found)]


def table(found: list[Trained]) -> Iterator[tuple[str, int, Tensor, metrics.Difference | None]]:
    """Variant, blocks, held-out losses (seeds, rows), and what that is against no remedy at that depth."""
    cells = {}
    for x in found:
        cells.setdefault((x.variant, x.blocks), {})[x.seed] = x.losses
    for (variant, blocks), by_seed in cells.items():
        none = cells.get(("none", blocks), {})
        pairs = [np.subtract(lost, none[seed]) for seed, lost in by_seed.items() if seed in none]
        yield (variant, blocks, np.array(list(by_seed.values())),
               metrics.paired(np.array(pairs)) if pairs and variant != "none" else None)


def draw(found: list[Trained], path: Path) -> None:
    """The held-out loss against depth, Eq. (3) of the last five hidden states, and where λ went."""
    fig, above, below, learned = pictures.figure(height=9.5, ratios=(1, 1, 1))
    seeds = len({x.seed for x in found})
    for variant in VARIANTS:
        blocks = sorted({x.blocks for x in found if x.variant == variant})
        same = [[x for x in found if (x.variant, x.blocks) == (variant, b)] for b in blocks]
        fmt = "o-" if variant in EVERYWHERE else "s"
        for ax, key, of in ((above, "losses", np.mean), (below, "similarity_per_layer", metrics.last_five)):
            values = [[of(getattr(x, key)) for x in some] for some in same]
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
            ax.errorbar(blocks, list(map(np.mean, values)), spread, fmt=fmt, ms=4, capsize=3, lw=1.4, label=variant)
    for ax, what in ((above, "held-out loss, nats per token"), (below, "Eq. (3), last five hidden states")):
        ax.set_xscale("log", base=2)
        ax.set_xticks(BLOCKS, BLOCKS)
        ax.set(ylabel=what)
    below.set_xlabel(f"blocks (bars: deviation over {seeds} seeds)")
    for blocks in sorted({x.blocks for x in found}):
        lam = np.array([x.lam for x in found if (x.variant, x.blocks) == ("h0, λ learned", blocks)])
        learned.errorbar(np.arange(2, blocks + 1) / blocks, lam.mean(0), lam.std(0, ddof=int(len(lam) > 1)),
                         fmt="o-", ms=3, capsize=2, lw=1.2, label=f"{blocks} blocks")
    learned.axhline(LAM, color="0.5", ls="--", lw=1)
    learned.set(xlabel="place of the block (1: the last one)", ylabel="learned λ (dashed: its start)", ylim=(0, 1))
    learned.legend(frameon=False)
    fig.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    files.write(path, fig.savefig)
