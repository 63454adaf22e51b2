"""Measures over-smoothing (Eq. 3; paper, Section 3.1); scores a run or a backbone, asks it, exports it; compares runs.
What a score is, and how the official code's differs: sibo_lab/evaluation/scoring.py."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import model
import sibo
from sibo_lab import cli, export, fast
from sibo_lab.backbone import chat_template, generate, subwords, tokenizer
from sibo_lab.data import batch, tasks
from sibo_lab.evaluation import arguments, compare, examples, metrics, pictures, scoring
from sibo_lab.evaluation.arguments import parser
from sibo_lab.publish import card, folder, hub, to_gguf


def similarity(hidden: Tensor, attention_mask: Tensor) -> float:
    """Eq. (3): the mean cosine over all pairs i ≠ j of a sentence's tokens, then the mean over the sentences.

    hidden (B, T, d), attention_mask (B, T) with 0 on padding. ValueError if no sentence has two tokens."""
    return float(_mean(similarities(hidden, attention_mask)))


def similarities(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Eq. (3) of each sentence of two or more tokens."""
    mask = attention_mask.bool()
    u = nn.functional.normalize(hidden.double(), dim=-1) * mask[..., None]  # (B, T, d): h / |h|, padding 0
    pairs = u.sum(1).square().sum(-1) - u.square().sum((1, 2))  # Σ_{i≠j} cos(h_i, h_j) = |Σ_i u_i|² − Σ_i |u_i|²
    m = mask.sum(1)  # (B,): tokens of each sentence
    return (pairs / (m * (m - 1)))[m > 1]


def _mean(similarities: Tensor) -> Tensor:
    if not similarities.shape[-1]:
        raise ValueError("similarity: expected a sentence of two or more tokens, got none")
    return similarities.mean(-1)


@torch.no_grad()
def layer_similarities(m: nn.Module, rows: Sequence[batch.Row], pad_id: int = 0, batch_size: int = 16) -> list[float]:
    """Eq. (3) of each of the L+1 hidden states: the curve of Figures 1 and 2."""
    generate.require_eval(m)
    found = []
    for start in range(0, len(rows), batch_size):
        b = batch.to_device(batch.collate(rows[start:start + batch_size], pad_id), m)
        b.pop("labels", None)
        found.append(torch.stack([similarities(h, b["attention_mask"]) for h in m.hidden_states(**b)]))
    return _mean(torch.cat(found, 1)).tolist()  # of (L+1, sentences)


def similarity_rows(m: nn.Module, t: subwords.Tokenizer, test: Sequence, most: int = 64,
                    protocol: str = "clean") -> list[batch.Row]:
    """The first texts of a test set as Eq. (3) sees them: an LLM's prompts, BERT's sentences."""
    if isinstance(m, model.Bert):
        texts = [tasks.Sentence(x.instruction, None, 0) if isinstance(x, tasks.Example) else x for x in test[:most]]
        return [batch.encode_sentence(s, t, m.config.max_position_embeddings) for s in texts]
    texts = [x if isinstance(x, tasks.Example) else tasks.Example(x.text) for x in test[:most]]
    return [batch.Row(t.encode(batch.prompt_of(x, t, protocol))) for x in texts]


def main(args: Namespace) -> None:
    if args.push is not None:
        if (args.export or [""])[0] not in ("hf", "peft"):
            raise ValueError(f"--push {args.push}: expected --export hf or peft, a folder to upload, got "
                             f"{args.export[0] if args.export else 'none'}")
        hub.require(args.push)
    if args.table:
        return table(args)
    arguments.complete(args)
    command = export_run if args.export else draw_similarity if args.similarity else ask if args.ask else score
    command(args)


def table(args: Namespace) -> None:
    runs, first = compare.read(args.table), args.table[0]
    out = args.out or (first if first.is_dir() else Path()) / "table.png"
    print(compare.tables(runs, args.markdown))
    if args.save:
        compare.save(runs, args.save)
    pictures.draw_runs(runs, out)
    print(f"\n{out}")


def load(args: Namespace) -> tuple[nn.Module, subwords.Tokenizer | chat_template.Chat]:
    m = model.build(args.spec, args.path, args.head or None)
    t = tokenizer.for_model(args.path, m.config.vocab_size, "pad" if isinstance(m, model.Bert) else "eos")
    if args.protocol == "chat":
        t = chat_template.Chat(args.path, t)
    return model.load_weights(m, args.path, args.dtype, args.device, args.config.get("base_bits")), t


def adapt(m: nn.Module, args: Namespace) -> nn.Module:
    """Puts the run, or peft's LoRA, onto the backbone; with --merge, folds it; with --compile, compiles its steps."""
    if args.run:
        sibo.load(m, args.run)
    if args.peft:
        export.from_peft(m, args.peft)
    if args.merge:
        sibo.merge(m)
    if args.compile:
        fast.compiled(m)
        torch.compiler.set_stance("force_eager")  # only the steps of an answer: all else has too many shapes
    return m


def export_run(args: Namespace) -> None:
    kind, out, result = args.export[0], Path(args.export[1]), card.read(Path(args.run))
    head = to_gguf.header(args.path) if kind == "gguf" else None  # refused before the weights are read
    m, t = load(args)
    adapt(m, args)
    if kind == "gguf":
        to_gguf.write(m, out, head, args.outtype)
        return print(out)
    if kind == "peft":
        export.to_peft(m, out, args.backbone)
    else:
        folder.write(m, out, args.path, args.classes, t.eos_ids)
    card.write(out, kind, args.push or out.resolve().name, args.config, result, getattr(m, "sibo", None), args.path,
               args.head)
    print(f"{out}/")
    if args.push:
        print(hub.push(out, args.push))


def draw_similarity(args: Namespace) -> None:
    (task, test), *_ = examples.load(args, args.tests[:1])
    out = args.out or Path(args.run or ".", "similarity.png")
    args.protocol = batch.protocol_for(args.protocol, test)
    m, t = load(args)
    rows = similarity_rows(m, t, test, protocol=args.protocol)
    curves = {args.backbone: layer_similarities(m, rows)}
    if args.run or args.peft:
        curves[args.config.get("method", "lora")] = layer_similarities(adapt(m, args), rows)
    pictures.draw_similarity(curves, out, f"{args.backbone} on {task.name}")
    for name, curve in curves.items():
        print(f"{name:14} {' '.join(f'{x:.3f}' for x in curve)}   last five {metrics.last_five(curve):.4f}")
    print(out)


def ask(args: Namespace) -> None:
    args.protocol = args.protocol or "clean"
    m, t = load(args)
    prompt = batch.prompt_of(tasks.Example(args.ask), t, args.protocol)
    beams = args.num_beams or scoring.BEAMS[args.protocol]
    print(scoring.responses(adapt(m, args), t, [prompt], 256, 1, beams)[0])


def score(args: Namespace) -> None:
    tests = examples.load(args, args.tests)
    scoring.require_answers(tests, args.score_by)
    if not args.held_out:
        examples.warn_of_overlap(args, tests)
    args.protocol = batch.protocol_for(args.protocol, [row for _, test in tests for row in test])
    m, t = load(args)
    adapt(m, args)
    for task, test in tests:
        if task.num_labels:
            rows = [batch.encode_sentence(s, t, args.config.get("cutoff", m.config.max_position_embeddings))
                    for s in test]
            found = scoring.score_sentences(m, t, task, rows, args.batch_size)
        else:
            found = scoring.score_examples(m, t, task, test, args.batch_size, args.num_beams, args.protocol,
                                           args.score_by)
        print(f"{task.name}: {found}" if len(tests) > 1 else found)


if __name__ == "__main__":
    cli.run(main, parser())
