"""generate.py against transformers' generate (real weights: test_model.py), and against running the whole prefix again
for each token."""

import shutil

import pytest
import torch
from twins import CAUSAL, assert_near, generated, padded, pair, words

import sibo
from sibo_lab.backbone import generate

ROWS = [words(1, n, seed=n)[0].tolist() for n in (7, 2, 12, 1, 9)]


@torch.no_grad()
def greedy_without_cache(m: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, n: int) -> torch.Tensor:
    """Runs the whole prefix again for every new token."""
    for _ in range(n):
        ids = torch.cat((ids, m(ids, mask)[:, -1].argmax(-1, keepdim=True)), 1)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
    return ids


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("seed", range(3))
def test_64_greedy_tokens_are_transformers(tmp_path, family, seed):
    theirs, ours = pair(family, tmp_path, seed)
    ids, mask = padded(ROWS, "left")
    assert torch.equal(generate.generate(ours, ids, mask, max_new_tokens=64),
                       generated(theirs, ids, mask, max_new_tokens=64))


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("extra", [0, 3])
def test_cached_decoding_equals_running_the_whole_prefix_again(tmp_path, family, extra):
    _, m = pair(family, tmp_path)
    ids, mask = padded(ROWS, "left", extra)
    assert torch.equal(generate.generate(m, ids, mask, max_new_tokens=30), greedy_without_cache(m, ids, mask, 30))


@torch.no_grad()
def test_a_prefix_fed_in_pieces_has_the_logits_of_the_whole(tmp_path):
    _, m = pair("llama", tmp_path)
    ids, mask = padded(ROWS, "left")
    cache = m.new_cache(len(ROWS), 12)
    for start, end in ((0, 5), (5, 6), (6, 12)):
        out = m(ids[:, start:end], mask[:, :end], cache=cache)
    assert_near(out, m(ids, mask)[:, -1:], 1e-5)


@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("family", CAUSAL)
def test_beams_are_transformers_beams(tmp_path, family, num_beams, stop):
    ids, mask = padded([[t % 17 for t in row] for row in ROWS], "left")
    stopped = 0
    for seed in range(2):
        theirs, ours = pair(family, tmp_path / str(seed), seed, vocab_size=17)
        how = {"max_new_tokens": 16, "num_beams": num_beams, "pad_token_id": 2}
        if stop:  # at a token that the first row writes when nothing stops it
            how["eos_token_id"] = int(generate.generate(ours, ids, mask, **how)[0, ids.shape[1] + 3 + seed])
        written = generate.generate(ours, ids, mask, **how)
        assert torch.equal(written, generated(theirs, ids, mask, **how))
        stopped += int((written[:, ids.shape[1]:] == how.get("eos_token_id", -1)).any(1).sum())
    assert not stop or 0 < stopped < 2 * len(ROWS), "some rows stop early and some do not"


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_any_of_several_ends_stops_as_in_transformers(tmp_path, num_beams):
    ids, mask = padded([[t % 17 for t in row] for row in ROWS], "left")
    for seed in range(3):
        theirs, ours = pair("llama", tmp_path / str(seed), seed, vocab_size=17)
        how = {"max_new_tokens": 16, "num_beams": num_beams, "pad_token_id": 2}
        free = generate.generate(ours, ids, mask, **how)[:, ids.shape[1]:]
        how["eos_token_id"] = sorted({int(free[0, 3]), int(free[1, 5]), int(free[2, 7])})
        written = generate.generate(ours, ids, mask, **how)
        assert torch.equal(written, generated(theirs, ids, mask, **how))
        assert written.shape != (len(ids), ids.shape[1] + 16) or (written[:, -1] == 2).any()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_row_of_a_batch_ends_as_it_does_alone_whichever_others_are_dropped(tmp_path, num_beams):
    _, m = pair("llama", tmp_path, vocab_size=17)
    rows = [words(1, n, 17, seed=n)[0].tolist() for n in range(1, 13)]
    ids, mask = padded(rows, "left")
    how = {"max_new_tokens": 40, "eos_token_id": 7, "pad_token_id": 2, "num_beams": num_beams}
    batches = []
    hook = m.head.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    together = generate.generate(m, ids, mask, **how)[:, ids.shape[1]:]
    hook.remove()
    assert num_beams > 1 or batches[-1] <= 6, "half of the rows were done, and dropped"
    lengths = set()
    for row, new in zip(rows, together, strict=True):
        alone = generate.generate(m, torch.tensor([row]), **how)[0, len(row):]
        assert new[: len(alone)].tolist() == alone.tolist() and set(new[len(alone):].tolist()) <= {2}
        lengths.add(len(alone))
    assert len(lengths) > 2, "the rows end at different times"


def test_behind_an_eos_stands_padding_and_without_a_pad_token_the_eos_again(tmp_path):
    theirs, ours = pair("llama", tmp_path, vocab_size=17)
    ids, mask = padded([[t % 17 for t in row] for row in ROWS], "left")
    free = generate.generate(ours, ids, mask, max_new_tokens=20)[:, ids.shape[1]:]
    eos = int(free[0, 3])  # a token that the first row does write
    for pad in (2, eos):
        how = {"max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": pad}
        written = generate.generate(ours, ids, mask, **how)
        assert torch.equal(written, generated(theirs, ids, mask, **how))
        new = written[0, ids.shape[1]:].tolist()
        assert new[new.index(eos) + 1:] == [pad] * (len(new) - new.index(eos) - 1) and new.index(eos) < len(new) - 1
    assert torch.equal(generate.generate(ours, ids, mask, max_new_tokens=20, eos_token_id=eos), written)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", CAUSAL)
def test_prompts_that_begin_alike_are_read_once_and_answered_alike(tmp_path, family, beams):
    """Also through a window of 5 tokens: the padding between the common part and a row's own takes none of them."""
    theirs, m = pair(family, tmp_path)
    m.double()
    rows = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 11], [5, 6, 7, 12, 13]]
    ids, mask = padded(rows, "left")
    widths = []
    handle = m.embed.register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape)))
    out = generate.generate(m, ids, mask, max_new_tokens=6, num_beams=beams)
    handle.remove()
    assert widths[:2] == [(1, 3), (3, 3)]
    for i, row in enumerate(rows):
        alone = generate.generate(m, torch.tensor([row]), max_new_tokens=6, num_beams=beams)
        assert out[i, -6:].tolist() == alone[0, -6:].tolist()
    assert torch.equal(out, generated(theirs.double(), ids, mask, max_new_tokens=6, num_beams=beams))


def test_generate_refuses_a_model_in_training_mode(tmp_path):
    _, m = pair("llama", tmp_path)
    with pytest.raises(ValueError, match="training mode"):
        generate.generate(m.train(), words(1, 3))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_refuses_prompts_padded_on_the_right(tmp_path, num_beams):
    _, m = pair("llama", tmp_path)
    with pytest.raises(ValueError, match="expected padding on the left"):
        generate.generate(m, *padded(ROWS, "right"), num_beams=num_beams)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize("merged", [False, True])
def test_compiled_blocks_write_the_same_tokens_and_compile_only_the_step_once_for_all_lengths(tmp_path, merged):
    """And for all numbers of rows."""
    _, m = pair("llama", tmp_path, vocab_size=17, num_hidden_layers=4)
    sibo.inject(m, "lora", 0.3, rank=4).eval()
    with torch.no_grad():
        for x in m.modules():
            if isinstance(x, sibo.LoRA):
                x.up.normal_(std=0.2)
    if merged:
        sibo.merge(m)
    rows = [words(1, n, 17, seed=n)[0].tolist() for n in range(1, 14)]  # 13 and 11 are no other size of the model
    inputs = [(padded(rows[:n], "left"), most, eos) for n, most, eos in ((13, 9, None), (11, 30, None), (13, 30, 7))]
    plain = [generate.generate(m, *of, max_new_tokens=most, eos_token_id=eos) for of, most, eos in inputs]
    torch._dynamo.reset()
    for block in m.blocks[1:]:
        block.compile(dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    with torch.compiler.set_stance("force_eager"):  # as after training
        for (of, most, eos), expected in zip(inputs, plain, strict=True):
            assert torch.equal(generate.generate(m, *of, max_new_tokens=most, eos_token_id=eos), expected)
            assert eos or graphs["unique_graphs"] == 1
