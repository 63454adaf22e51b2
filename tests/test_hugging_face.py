"""transformers' Trainer, accelerate and TRL on injected models, and what save_pretrained leaves for from_pretrained."""

import copy
import gc
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_models import hugging_face, ids, inject, stir

import sibo

hf = pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """Trainer collects garbage at each start, 0.7 s of it through what the libraries imported."""
    assert hf.Trainer and hf.LlamaForCausalLM and hf.BertForSequenceClassification  # imported now
    gc.freeze()
    yield
    gc.unfreeze()


def classifier():
    c = hf.LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_labels=3,
                       num_key_value_heads=2, intermediate_size=24, pad_token_id=0)
    m, g = hf.LlamaForSequenceClassification(c).eval(), torch.Generator().manual_seed(2)
    for p in m.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return m


KINDS = {"llama": lambda: hugging_face("llama"), "bert, classifying": lambda: hugging_face("bert", head=True),
         "llama, classifying": classifier}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_method = pytest.mark.parametrize("name", ["adapter-sibo", "lora-sibo"])


def injected(kind, name="lora-sibo", seed=0, **settings):
    m = KINDS[kind]()
    torch.manual_seed(seed)
    return inject(m, name, **settings)


def trained(m):
    return {n: p.detach().clone() for n, p in m.named_parameters() if p.requires_grad}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def rows(kind, n=8):
    return [{"input_ids": t, "labels": i % 3 if "classifying" in kind else t}
            for i, t in enumerate(ids(B=n).tolist())]


def arguments(folder, kind=None, **more):
    return (kind or hf.TrainingArguments)(str(folder), **{
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True} | more)


def trainer(m, kind, folder, compute_metrics=None, **more):
    return hf.Trainer(m, arguments(folder, **more), train_dataset=rows(kind), eval_dataset=rows(kind),
                      compute_metrics=compute_metrics)


def by_hand(plain, m, lam=0.3, scale=2.0):
    """LoRA-SIBO as hooks on an untouched copy, `plain`, with the weights of `m`. Returns its trained parameters."""
    weights = {n: torch.nn.Parameter(t) for n, t in trained(m).items()}
    seen, blocks = {}, next(x for x in plain.modules() if isinstance(x, torch.nn.ModuleList))
    plain.requires_grad_(False)

    def capture(block, args, kwargs):
        seen["h0"] = args[0] if args else kwargs["hidden_states"]

    def add(name, x, args, out):
        h = torch.lerp(args[0], seen["h0"], lam) if name.endswith(m.sibo.sibo_at) else args[0]
        return out + scale * h @ weights[f"{name}.down"].T @ weights[f"{name}.up"].T

    blocks[0].register_forward_pre_hook(capture, with_kwargs=True)
    for name, x in plain.named_modules():
        if f"{name}.down" in weights:
            x.register_forward_hook(lambda *call, name=name: add(name, *call))
        elif name in m.sibo.modules_to_save:
            for leaf in ("weight", "bias"):
                if f"{name}.{leaf}" in weights:
                    setattr(x, leaf, weights[f"{name}.{leaf}"])
    return weights


# Trainer


@every_method
@every_kind
def test_what_trainer_saves_is_the_trained_model_for_sibo_load(kind, name, tmp_path):
    m = injected(kind, name)
    before, t = trained(m), trainer(m, kind, tmp_path / "run")
    t.train()
    assert not any(torch.equal(p, before[n]) for n, p in trained(m).items())  # LoRA or adapter, and head
    assert any(n.startswith(("classifier", "score")) for n in before) == ("classifying" in kind)
    t.save_model(tmp_path / "saved")
    fresh = sibo.load(KINDS[kind](), tmp_path / "saved").eval()
    assert fresh.sibo == m.sibo and torch.equal(fresh(ids()).logits, m.eval()(ids()).logits)


@pytest.mark.parametrize("settings", [{"dropout": 0.2}, {"dropout": 0.2, "learn_lam": True}])
@every_kind
def test_a_run_resumed_from_a_checkpoint_ends_as_one_that_never_stopped_bit_for_bit(kind, settings, tmp_path):
    whole = injected(kind, **settings)
    trainer(whole, kind, tmp_path, save_strategy="steps", save_steps=2).train()
    resumed = injected(kind, seed=9, **settings)
    assert not equal(trained(resumed), trained(injected(kind, **settings)))  # nothing is right by chance
    trainer(resumed, kind, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(trained(resumed), trained(whole))


def test_a_checkpoint_of_an_injected_model_does_not_resume_in_one_that_is_not(tmp_path):
    trainer(injected("llama"), "llama", tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer(KINDS["llama"](), "llama", tmp_path / "again").train(str(tmp_path / "checkpoint-2"))


@every_method
@every_kind
def test_at_the_end_the_best_weights_are_back_and_not_the_last(kind, name, tmp_path):
    m, seen, scores = injected(kind, name), [], iter([0.1, 0.9, 0.5, 0.2])

    def judge(_):
        seen.append(trained(m))
        return {"judged": next(scores)}

    trainer(m, kind, tmp_path, judge, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            load_best_model_at_end=True, metric_for_best_model="judged", greater_is_better=True).train()
    assert len(seen) == 4 and equal(trained(m), seen[1]) and not equal(seen[1], seen[3])
    fresh = sibo.load(KINDS[kind](), tmp_path / "checkpoint-2").eval()
    assert torch.equal(fresh(ids()).logits, m.eval()(ids()).logits)


@every_kind
def test_the_loss_with_label_smoothing_is_its_definition_on_the_model_by_hand(kind, tmp_path):
    m, plain, smoothing = stir(injected(kind)).eval(), KINDS[kind](), 0.2
    t = trainer(m, kind, tmp_path, label_smoothing_factor=smoothing)
    by_hand(plain, m)
    batch = t.data_collator(rows(kind))
    with torch.no_grad():
        logits, labels = plain(batch["input_ids"]).logits, batch["labels"]
        if kind == "llama":
            logits, labels = logits[:, :-1], labels[:, 1:]
        logp = logits.log_softmax(-1)
        expected = -(1 - smoothing) * logp.gather(-1, labels[..., None]).mean() - smoothing * logp.mean()
        torch.testing.assert_close(t.compute_loss(m, dict(batch)), expected)
    assert abs(expected - KINDS[kind]()(**batch).loss) > 1e-3  # of the model without LoRA, without smoothing


@pytest.mark.parametrize("reentrant", [False, True])
@every_method
@every_kind
def test_checkpointing_runs_each_block_twice_and_changes_no_bit(kind, name, reentrant, tmp_path):
    plain, m, passes = injected(kind, name, learn_lam=True), injected(kind, name, learn_lam=True), []
    trainer(plain, kind, tmp_path).train()
    for x in m.modules():
        if isinstance(x, torch.nn.ModuleList) and "Layer" in type(x[0]).__name__:
            next(x[0].children()).register_forward_pre_hook(lambda *_: passes.append(1))
    trainer(m, kind, tmp_path, activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant}).train()
    assert len(passes) == 2 * 4 and equal(trained(m), trained(plain))


@every_kind
def test_trainer_trains_lora_sibo_as_adamw_does_on_the_model_by_hand(kind, tmp_path):
    m, plain = injected(kind), KINDS[kind]().train()
    weights = list(by_hand(plain, m).values())
    t = trainer(m, kind, tmp_path, lr_scheduler_type="constant", max_grad_norm=0, per_device_train_batch_size=8)
    t.train()
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0)
    for _ in range(4):
        plain(**t.data_collator(rows(kind))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(list(trained(m).values()), [p.data for p in weights], rtol=0, atol=1e-3)


def test_with_neftune_h0_is_the_embedding_with_its_noise_as_the_first_block_reads_it(tmp_path):
    m, seen = stir(injected("llama")), {}
    up_proj = m.model.layers[1].mlp.up_proj

    def note(x, args, out):
        low = F.linear(F.linear(torch.lerp(args[0], seen["h0"], 0.3), x.down), x.up)
        seen["difference"] = float((out - x.base(args[0]) - 2 * low).detach().abs().max())

    m.model.layers[0].register_forward_pre_hook(lambda x, args: seen.update(h0=args[0].detach()))
    up_proj.register_forward_hook(note)
    trainer(m, "llama", tmp_path, neftune_noise_alpha=5.0, max_steps=1, per_device_train_batch_size=8).train()
    vectors = m.model.embed_tokens.weight
    assert not (seen["h0"].flatten(0, 1)[:, None] == vectors).all(-1).any()  # no token is without noise
    assert seen["difference"] < 1e-5


# accelerate


@every_method
def test_accelerate_takes_a_saved_state_back_and_goes_on_from_it_bit_for_bit(name, tmp_path):
    from accelerate import Accelerator

    a = Accelerator(cpu=True)
    m = injected("llama", name, **({"dropout": 0.2} if "lora" in name else {})).train()
    m, optimizer = a.prepare(m, torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2))

    def train():
        for seed in range(2):
            a.backward(m(ids(seed), labels=ids(seed)).loss)
            optimizer.step()
            optimizer.zero_grad()
        return trained(m)

    at_save = train()
    a.save_state(tmp_path / "state")
    ends = train()
    assert not equal(at_save, ends)
    a.load_state(tmp_path / "state")
    assert equal(trained(m), at_save) and equal(train(), ends)
    a.unwrap_model(m).save_pretrained(
        tmp_path / "saved", is_main_process=a.is_main_process, save_function=a.save, state_dict=a.get_state_dict(m))
    assert equal(trained(sibo.load(KINDS["llama"](), tmp_path / "saved")), ends)


# save_pretrained


def loaders(m):
    """All ways to a model from the folder of `m`."""
    return {
        "the task's Auto class": (hf.AutoModelForCausalLM if hasattr(m, "lm_head") else
                                  hf.AutoModelForSequenceClassification).from_pretrained,
        "AutoModel": hf.AutoModel.from_pretrained,
        "the class": type(m).from_pretrained,
        "the class, with config=": lambda d: type(m).from_pretrained(d, config=copy.deepcopy(m.config)),
        "the base, with config=": lambda d: type(m.base_model).from_pretrained(d, config=copy.deepcopy(m.config)),
    }


def ways(folder, m):
    """What each loader made of the folder: the same outputs as those of `m` or its base, others, or a refusal."""
    did = {}
    for way, load in loaders(m).items():
        try:
            got = load(folder).eval()
        except (ValueError, RuntimeError, OSError):
            did[way] = "refused"
        else:
            same = torch.equal(got(ids())[0], (m if type(got) is type(m) else m.base_model)(ids())[0])
            did[way] = "right" if same else "wrong"
    return did


def all_ways(m, what):
    return dict.fromkeys(loaders(m), what)


@every_method
@every_kind
def test_an_injected_model_saved_is_refused_by_every_from_pretrained_and_right_by_sibo_load(kind, name, tmp_path):
    m = stir(injected(kind, name)).eval()
    m.save_pretrained(tmp_path)
    assert ways(tmp_path, m) == all_ways(m, "refused")
    assert torch.equal(sibo.load(KINDS[kind](), tmp_path)(ids()).logits, m(ids()).logits)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_saves_its_own_weights(change, tmp_path):
    m = stir(injected("llama"))
    twin = stir(change(m), seed=1)
    twin.save_pretrained(tmp_path)
    assert equal(trained(sibo.load(KINDS["llama"](), tmp_path)), trained(twin)) and not equal(trained(twin), trained(m))


@every_kind
def test_a_merged_plain_lora_saved_is_the_merged_model_to_transformers(kind, tmp_path):
    m = sibo.merge(stir(injected(kind, "lora")))
    m.save_pretrained(tmp_path / "whole")
    assert ways(tmp_path / "whole", m) == all_ways(m, "right")
    m.base_model.save_pretrained(tmp_path / "base")
    base = type(m.base_model).from_pretrained(tmp_path / "base").eval()
    assert torch.equal(base(ids())[0], m.base_model(ids())[0])


@pytest.mark.parametrize("name", ["lora-sibo", "lora, learned λ", "lora, frozen too"])
@every_kind
def test_a_merged_lora_sibo_is_not_saved_in_transformers_format(kind, name, tmp_path):
    m = sibo.merge(stir(injected(kind, name)))
    for x in (m, m.base_model):
        with pytest.raises(ValueError, match="at random"):
            x.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="at random"):
        trainer(m, kind, tmp_path / "run").save_model()
    assert not list(tmp_path.rglob("*.safetensors"))


@every_method
@every_kind
def test_after_remove_the_model_saves_as_one_that_was_never_injected(kind, name, tmp_path):
    m = sibo.remove(stir(injected(kind, name)))
    m.save_pretrained(tmp_path / "removed")
    KINDS[kind]().save_pretrained(tmp_path / "untouched")
    for file in (tmp_path / "untouched").iterdir():
        assert file.read_bytes() == (tmp_path / "removed" / file.name).read_bytes()


@every_method
@every_kind
def test_the_inner_model_of_an_injected_one_is_not_saved_without_the_rest(kind, name, tmp_path):
    with pytest.raises(ValueError, match="at random"):
        injected(kind, name).base_model.save_pretrained(tmp_path / "inner")
    assert not (tmp_path / "inner").exists()


@every_method
@every_kind
def test_a_model_within_a_module_that_was_injected_is_not_saved_without_the_rest(kind, name, tmp_path):
    outer = torch.nn.ModuleDict({"m": KINDS[kind]()})
    inject(outer, name)
    with pytest.raises(ValueError, match="at random"):
        outer["m"].save_pretrained(tmp_path / "inner")
    sibo.save(outer, tmp_path / "saved")
    fresh = sibo.load(torch.nn.ModuleDict({"m": KINDS[kind]()}), tmp_path / "saved")
    assert equal(trained(fresh), trained(outer))


@every_method
@every_kind
def test_a_model_around_an_injected_one_is_not_saved_without_what_it_needs(kind, name, tmp_path):
    m = KINDS[kind]()
    inject(m.base_model, name)
    with pytest.raises(ValueError, match="at random"):
        m.save_pretrained(tmp_path / "outer")
    assert not (tmp_path / "outer").exists()


def test_other_values_given_to_save_pretrained_are_those_saved(tmp_path):
    m = stir(injected("llama"))
    average = {n: t * 0.5 for n, t in m.state_dict().items()}  # as of weights averaged over steps
    m.save_pretrained(tmp_path, state_dict=average)
    assert equal(trained(sibo.load(KINDS["llama"](), tmp_path)), {n: average[n] for n in trained(m)})


class Hub:
    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **_):
        return type("Url", (), {"repo_id": repo_id})


@pytest.mark.parametrize("change", ["injected", "merged"])
def test_what_push_to_hub_uploads_is_refused_by_from_pretrained_or_never_written(change, tmp_path, monkeypatch):
    import shutil

    from transformers.utils import hub

    m, uploads = stir(injected("llama")), []
    monkeypatch.setattr(hub, "hf_api", lambda: Hub(tmp_path))
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: type(
        "Card", (), {"save": lambda self, path: None})())
    monkeypatch.setattr(type(m), "_upload_modified_files", lambda self, folder, *_, **__: uploads.append(
        shutil.copytree(folder, tmp_path / "uploaded")), raising=False)
    if change == "merged":
        with pytest.raises(ValueError, match="at random"):
            sibo.merge(m).push_to_hub("somebody/something")
        assert not uploads
        return
    m.push_to_hub("somebody/something")
    assert ways(uploads[0], m) == all_ways(m, "refused")
    assert equal(trained(sibo.load(KINDS["llama"](), uploads[0])), trained(m))
    with pytest.raises(ValueError, match="push_to_hub"):
        m.save_pretrained(tmp_path / "saved", push_to_hub=True)


# TRL


@pytest.fixture(scope="module")
def words():
    """A tokenizer of 40 words, w3 to w39."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    t = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 40)}, "<pad>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", eos_token="</s>")


def texts(seed, n=8):
    return [" ".join(f"w{3 + i % 37}" for i in row[:length])
            for row, length in zip(ids(seed, n).tolist(), [7, 5, 6, 3] * n, strict=False)]


def adamw(weights, loss):
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0)
    for _ in range(4):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in weights.items()}


def padded(words, some):
    return words([f"{text} </s>" for text in some], padding=True, return_tensors="pt")


TRL = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "per_device_train_batch_size": 8, "bf16": False}


def test_trls_sft_trainer_trains_lora_sibo_as_adamw_does_on_the_model_by_hand(words, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    m, plain = injected("llama"), KINDS["llama"]()
    weights = by_hand(plain, m)
    t = trl.SFTTrainer(m, arguments(tmp_path / "run", trl.SFTConfig, **TRL), processing_class=words,
                       train_dataset=datasets.Dataset.from_dict({"text": texts(0)}))
    t.train()
    batch = padded(words, texts(0))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def loss():
        logits = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    before = trained(injected("llama"))
    expected = adamw(weights, loss)
    torch.testing.assert_close(trained(m), expected, rtol=0, atol=1e-3)
    assert min((expected[n] - before[n]).abs().max() for n in before) > 0.01
    t.save_model(tmp_path / "saved")
    assert equal(trained(sibo.load(KINDS["llama"](), tmp_path / "saved")), trained(m))


def test_trls_reward_trainer_trains_lora_sibo_and_the_score_as_adamw_does_on_the_model_by_hand(words, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def reward():
        m = classifier()
        m.config.num_labels = m.num_labels = 1
        m.score = torch.nn.Linear(16, 1, bias=False)
        m.score.weight.data.fill_(0.1)
        return m

    torch.manual_seed(0)
    m, plain = inject(reward(), "lora-sibo"), reward()
    weights = by_hand(plain, m)
    before = trained(m)
    t = trl.RewardTrainer(m, arguments(tmp_path / "run", trl.RewardConfig, **TRL), processing_class=words,
                          train_dataset=datasets.Dataset.from_dict({"chosen": texts(0), "rejected": texts(1)}))
    t.train()
    batch = padded(words, texts(0) + texts(1))
    expected = adamw(weights, lambda: -F.logsigmoid(torch.sub(*plain(**batch).logits[:, 0].chunk(2))).mean())
    torch.testing.assert_close(trained(m), expected, rtol=0, atol=1e-3)
    assert "score.weight" in before and min((expected[n] - before[n]).abs().max() for n in before) > 0.01
    t.save_model(tmp_path / "saved")
    assert equal(trained(sibo.load(reward(), tmp_path / "saved")), trained(m))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["transformers_weights"].startswith("none")
