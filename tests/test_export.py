"""What leaves for peft and transformers computes there what it does here."""

import json

import pytest
import torch
from small_models import hugging_face, ids, inject, output, sibo_layers, stir, twins
from twins import pair

import model
import sibo
from sibo_lab import export
from sibo_lab.data import batch
from sibo_lab.training import loop, recipes
from sibo_lab.training.optimizer import adamw


@pytest.mark.parametrize(("family", "head"), [("llama", False), ("gptj", False), ("bert", False), ("bert", True)])
def test_peft_loads_a_plain_lora_and_computes_the_same(family, head, tmp_path):
    import peft

    theirs, ours = twins(family, tmp_path / "base", head)
    stir(inject(ours, "lora"))
    if head:
        with torch.no_grad():
            for p in ours.classifier.parameters():
                p.add_(0.1)
    export.to_peft(ours, tmp_path / "peft", "base")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    torch.testing.assert_close(output(loaded, ids()), output(ours, ids()), rtol=0, atol=2e-5)


def test_only_the_adapted_modules_are_adapted_there_not_all_of_their_name(tmp_path):
    import peft

    theirs, ours = twins("llama", tmp_path / "base")
    stir(inject(ours, "lora", targets=("blocks.1.attn.q_proj",)))
    export.to_peft(ours, tmp_path / "peft", "base")
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    torch.testing.assert_close(output(loaded, ids()), output(ours, ids()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("whole", ["embed", "head"])
def test_an_embedding_trained_whole_is_also_the_head_that_it_is_tied_to(whole, tmp_path):
    import peft

    theirs, ours = pair("llama", tmp_path / "base", tie_word_embeddings=True)
    stir(inject(ours, "lora", modules_to_save=(whole,)))
    with torch.no_grad():
        ours.embed.weight.mul_(1.5)
    export.to_peft(ours, tmp_path / "peft", "base")
    again = export.from_peft(model.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    for m in (again, loaded):
        torch.testing.assert_close(output(m, ids()), output(ours, ids()), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "says"), [
    ("lora-sibo", "expected a plain LoRA, got λ = 0.3: peft has no h0"),
    ("adapter", "expected a plain LoRA, got adapters"), ("adapter-sibo", "expected a plain LoRA, got adapters"),
])
def test_what_peft_cannot_express_is_refused_with_the_reason(name, says, tmp_path):
    _, ours = twins("llama", tmp_path / "base")
    with pytest.raises(ValueError, match=says):
        export.to_peft(inject(ours, name), tmp_path / "peft", "base")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("family,name,checkpointing", [
    ("llama", "adapter-sibo", False), ("llama", "lora-sibo", True), ("llama", "lora, learned λ", False),
    ("gptj", "lora-sibo", False), ("bert", "adapter-sibo", False)])
def test_transformers_own_trainer_trains_an_injected_model_as_our_loop_does(family, name, checkpointing, tmp_path):
    from transformers import Trainer, TrainingArguments

    theirs, ours = twins(family, tmp_path / "base", head=family == "bert")
    torch.manual_seed(3)
    inject(theirs, name)
    frozen = {n: p.clone() for n, p in theirs.named_parameters() if not p.requires_grad}
    inject(ours, name)
    if family == "bert":  # ours is part of the classifier; theirs stands outside it, and stays frozen
        ours.classifier.pooler.requires_grad_(False)
    for (_, a), (_, b) in zip(sibo_layers(theirs), sibo_layers(ours), strict=True):
        b.down.data.copy_(a.down)
    texts = [t.tolist() for t in ids(B=8, T=9)]
    labels = [i % 3 if family == "bert" else t for i, t in enumerate(texts)]
    Trainer(theirs, TrainingArguments(
        tmp_path / "theirs", max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        activation_checkpointing=checkpointing, activation_checkpointing_kwargs={"use_reentrant": False}),
        train_dataset=[{"input_ids": t, "labels": y} for t, y in zip(texts, labels, strict=True)],
        optimizers=(adamw(theirs, 1e-2) if "learned" in name else None, None)).train()
    run = recipes.Run(steps=20, lr=1e-2, warmup=0, batch_size=8, micro_batch_size=8, out=str(tmp_path / "ours"))
    loop.fit(ours, [batch.Row(t, y) for t, y in zip(texts, labels, strict=True)], 0, run)
    assert all(torch.equal(p, frozen[n]) for n, p in theirs.named_parameters() if n in frozen)
    for (_, a), (_, b) in zip(sibo_layers(theirs), sibo_layers(ours), strict=True):
        assert a.up.abs().max() > 0.02  # it has learned
        torch.testing.assert_close((a.down, a.up, a.lam()), (b.down, b.up, b.lam()), rtol=0, atol=2e-3)
    sibo.save(theirs, tmp_path / "saved")
    fresh = sibo.load(hugging_face(family, family == "bert"), tmp_path / "saved").eval()
    assert torch.equal(output(fresh, ids()), output(theirs.eval(), ids()))
