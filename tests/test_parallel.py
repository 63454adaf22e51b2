"""N processes train, save and score what a single one does, sharded or not.

All cases run once in 2 processes and once in 4 (gloo, CPU); each process writes what it found."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import model
import sibo
import train
from sibo_lab import cli, parallel
from sibo_lab.data import batch, tasks
from sibo_lab.evaluation import scoring
from sibo_lab.training import loop, options, recipes

ROOT = Path(__file__).parent.parent
LLAMA = {"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}
BERT = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CASES = {  # the model's config, method, learned λ, micro-batch; sharded ones recompute activations
    "full": (LLAMA, "full", False, 2),
    "full-tied": (LLAMA | {"tie_word_embeddings": True}, "full", False, 1),
    "adapter": (LLAMA, "adapter", False, 1),
    "adapter-sibo": (LLAMA, "adapter-sibo", False, 2),
    "adapter-sibo-learned": (LLAMA, "adapter-sibo", True, 2),
    "lora": (LLAMA, "lora", False, 3),
    "lora-sibo": (LLAMA, "lora-sibo", False, 1),
    "lora-sibo-learned": (LLAMA, "lora-sibo", True, 2),
    "bert": (BERT, "lora-sibo", False, 2),
}
SHARDED = {False: "whole", True: "sharded"}


@dataclass
class Letters:
    """The part of a tokenizer that scoring uses."""

    eos_id: int = 1
    pad_id: int = 0

    def encode(self, text):
        return [2 + ord(c) % 38 for c in text]

    def decode(self, ids):
        return " ".join(map(str, ids))


def random_model(config):
    m = model.build(config, num_labels=2 if config is BERT else None).to_empty(device="cpu").double()
    g = torch.Generator().manual_seed(0)
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=g)
    if config.get("tie_word_embeddings"):
        m.head.weight = m.embed.weight
    return m.eval()


def rows(config):
    """17, so that one of the batches of 7 has 3 rows, fewer than there are processes; one row has no label."""
    some = [[1, 2, *range(3 + i % 9, 6 + i % 9 + i)] for i in range(17)]
    if config is BERT:
        return [batch.Row(ids, i % 2, types=[0] * len(ids)) for i, ids in enumerate(some)]
    return [batch.Row(ids, [-100] * (len(ids) if i == 4 else 3) + ids[3:] * (i != 4)) for i, ids in enumerate(some)]


def fit(name, shard, folder):
    config, method, learned, micro = CASES[name]
    run = recipes.run_of(method, out=str(folder), lam=0.2, learn_lam=learned, steps=3, batch_size=7,
                         micro_batch_size=micro, warmup=1, lr=0.05, rank=4, bottleneck=4, dropout=0.0, shard=shard,
                         grad_checkpoint=shard)
    torch.manual_seed(run.seed)
    m = random_model(config)
    m = sibo.inject(m, **vars(run.settings)).double() if run.settings else m.requires_grad_(True)  # λ in double too
    folder.mkdir(exist_ok=True)
    loop.fit(m, rows(config), 0, run)
    sibo.save(m, folder)
    return m


def scores(m, config):
    if config is BERT:
        return scoring.score_sentences(m, Letters(), tasks.task("rte"), rows(config), batch_size=2).more
    prompts = ["a b", "say two", "and three of them", "d", "e", "end"]
    logps = scoring.likelihoods(m, Letters(), prompts, [["yes", "yes, yes", "no"][i % 2:] for i in range(6)], 2)
    return [*scoring.responses(m, Letters(), prompts, 6, batch_size=1),
            *([round(x, 6) for x in logp] for some in logps for logp in some)]


def work(rank, world, folder):
    """What each process does: all cases, whole and sharded."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    for name in CASES:
        for shard in SHARDED:
            m = fit(name, shard, folder / f"{name}-{SHARDED[shard]}-{world}")
            found = {"scores": scores(m, CASES[name][0]), "seed": torch.initial_seed()}
            (folder / f"{name}-{SHARDED[shard]}-{world}" / f"rank{rank}.json").write_text(json.dumps(found))
    for shard in SHARDED:
        stop_and_resume(folder / f"stopped-{SHARDED[shard]}-{world}", shard)
    dist.destroy_process_group()


def stop_and_resume(folder, shard):
    """A run of four steps with dropout; then the same, stopped by a signal to the last process alone, and resumed."""
    def validate(m):
        if parallel.rank() == parallel.world() - 1 and len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(1)
        return 1e-12 * len(seen) * parallel.rank()  # slightly different everywhere, as sums on GPUs are

    for name, resuming in (("whole", False), ("parts", False), ("parts", True)):
        run = recipes.run_of("lora-sibo", lam=0.2, learn_lam=True, steps=4, batch_size=7, micro_batch_size=2, rank=4,
                             dropout=0.1, validate_every=1, shard=shard, out=str(folder / name))
        torch.manual_seed(0)
        m = sibo.inject(random_model(LLAMA), **vars(run.settings)).double()
        seen = [1, 1] if resuming or name == "whole" else []  # after two it is never stopped
        with contextlib.suppress(KeyboardInterrupt):
            loop.fit(m, rows(LLAMA), 0, run, validate, resuming=resuming)
            sibo.save(m, folder / name)


def start(work, *args, processes, join=True):
    multiprocessing.set_forkserver_preload(["train", "torch.distributed.fsdp"])  # imported once for all
    return mp.start_processes(work, args, processes, join=join, start_method="forkserver")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All cases, by one process, by 2 and by 4: CASE-whole, CASE-whole-2, CASE-sharded-2 …"""
    folder = tmp_path_factory.mktemp("parallel")
    for name in CASES:
        found = {"scores": scores(fit(name, False, folder / f"{name}-whole"), CASES[name][0])}
        (folder / f"{name}-whole" / "rank0.json").write_text(json.dumps(found))
    torch.compiler.set_stance("default")  # loop.fit ends in eager mode
    for world in (2, 4):
        start(work, world, folder, processes=world)
    return folder


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a, b):
    """The largest difference between two runs' saved tensors."""
    a, b = load_file(a / "adapter.safetensors"), load_file(b / "adapter.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


everywhere = pytest.mark.parametrize("world", [2, 4])
whole_or_sharded = pytest.mark.parametrize("how", SHARDED.values())


@everywhere
@whole_or_sharded
@pytest.mark.parametrize("name", CASES)
def test_many_processes_train_as_one_does(folder, name, how, world):
    one, many = folder / f"{name}-whole", folder / f"{name}-{how}-{world}"
    assert len(losses(one)) == 3 and losses(many) == pytest.approx(losses(one), abs=1e-9)
    assert largest_difference(one, many) < 1e-9


@everywhere
@whole_or_sharded
@pytest.mark.parametrize("name", CASES)
def test_each_process_scores_its_share_and_all_get_every_score_in_order(folder, name, how, world):
    one = json.loads((folder / f"{name}-whole" / "rank0.json").read_text())["scores"]
    for rank in range(world):
        many = json.loads((folder / f"{name}-{how}-{world}" / f"rank{rank}.json").read_text())
        assert many["scores"] == (pytest.approx(one) if isinstance(one, dict) else one)


@everywhere
@whole_or_sharded
def test_processes_stopped_by_a_signal_to_one_of_them_resume_bit_for_bit(folder, how, world):
    whole, parts = (folder / f"stopped-{how}-{world}" / name for name in ("whole", "parts"))
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    assert (parts / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


@everywhere
def test_dropout_is_seeded_by_the_rank(folder, world):
    seeds = [json.loads((folder / f"lora-whole-{world}" / f"rank{r}.json").read_text())["seed"] for r in range(world)]
    assert seeds == list(range(world))


def test_an_adapter_saved_by_four_sharded_processes_loads_in_one(folder):
    m = sibo.load(random_model(LLAMA), folder / "lora-sibo-sharded-4")
    one = sibo.load(random_model(LLAMA), folder / "lora-sibo-whole")
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.allclose(m(ids), one(ids), rtol=0, atol=1e-9)
    assert scores(m, LLAMA) == json.loads((folder / "lora-sibo-whole" / "rank0.json").read_text())["scores"]


# ------------------------------------------------------------------------------------------------------- how it ends


def lose(args):
    parallel.all_reduce(torch.ones(1))
    if parallel.rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    parallel.all_reduce(torch.ones(1))


def refuse(args):
    def claim():
        raise ValueError("the folder is taken")

    parallel.one_rank_at_a_time(claim, ranks=1)


def command(rank, port, folder, main):
    """A process as torchrun starts it, with its errors in a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sys.argv = ["train.py"]
    with open(folder / f"err{rank}", "w") as err, contextlib.redirect_stderr(err):
        cli.run(main, cli.Parser("train.py"))


def ends(main, folder):
    """(exit codes, error messages) of two processes that both run `main`."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun's outlives them too
    group = start(command, store.port, folder, main, processes=2, join=False)
    for p in group.processes:
        p.join(60)
    return [p.exitcode for p in group.processes], [(folder / f"err{r}").read_text() for r in range(2)]


def test_a_killed_process_ends_the_others_with_a_line(tmp_path):
    codes, errors = ends(lose, tmp_path)
    assert codes == [-signal.SIGKILL, 2]
    assert errors[1].startswith("error: lost touch with another process") and errors[1].count("\n") == 1


def test_an_error_of_one_process_ends_all_and_is_printed_once(tmp_path):
    codes, errors = ends(refuse, tmp_path)
    assert codes == [2, 2] and "".join(errors) == "error: the folder is taken\n"


def train_bert(folder, args):
    train.main(options.parser().parse_args([
        "--backbone", str(folder / "bert"), "--task", "cola", "--data-dir", str(folder), "--method", "lora-sibo",
        "--shard", "--dtype", "bfloat16", "--steps", "2", "--device", "cpu", "--out", str(folder / "run")]))


def test_a_sharded_bert_in_16_bits_has_its_head_in_32_before_and_after_training(tmp_path, tiny_bert):
    shutil.copytree(tiny_bert, tmp_path / "bert")
    (tmp_path / "glue/CoLA").mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "glue/CoLA" / name).write_text("".join(f"x\t{i % 2}\t\tSome {i} words.\n" for i in range(8)))
    codes, errors = ends(partial(train_bert, tmp_path), tmp_path)
    assert codes == [0, 0], errors
    trained = load_file(tmp_path / "run/adapter.safetensors")
    assert trained["classifier.out.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "run/result.json").read_text())["baseline_similarity_per_layer"]


def test_shard_without_torchrun_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="--shard: expected .*, got one"):
        train.main(options.parser().parse_args(["--shard"]))


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("alone")
    args = ["train.py", "--backbone", tiny_llama, "--method", "lora-sibo", "--learn-lam", "--dropout", 0, "--steps", 3,
            "--batch-size", 5, "--micro-batch-size", 2, "--limit", 3, "--cutoff", 64, "--train-on-inputs", "--dtype",
            "float32", "--device", "cpu", "--lr", "1e-2", "--warmup", 1]
    subprocess.run([sys.executable, *map(str, args), "--out", folder / "run"], cwd=ROOT, check=True,
                   capture_output=True)
    return args, folder / "run"


@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_torchrun_trains_scores_and_writes_as_one_process_does(alone, tmp_path, shard):
    args, one = alone
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]  # on any free port
    done = subprocess.run([*torchrun, *map(str, args), *shard, "--out", tmp_path / "run"], cwd=ROOT, timeout=300,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in one.iterdir()}
    assert losses(tmp_path / "run") == pytest.approx(losses(one), abs=1e-5)
    assert largest_difference(one, tmp_path / "run") < 1e-4
    a, b = (json.loads((run / "result.json").read_text()) for run in (one, tmp_path / "run"))
    for key in ("score", "n", "baseline_score", "trainable_parameters", "total_parameters"):
        assert a[key] == b[key]
    assert a["lambda"] == pytest.approx(b["lambda"], abs=1e-3) and done.stdout.count("accuracy") == 1
