"""Greedy and beam search with a cache of keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sibo_lab import fast


@dataclass
class KeyValues:
    """One layer's keys and values, (B, H, capacity, D), of `length` tokens so far."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def grow(self, T: int) -> tuple[Tensor, Tensor]:
        """All keys and values, (B, H, S, D), with T empty places at their end, to be written by the caller."""
        self.length += T
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]

    def select(self, rows: Tensor) -> "KeyValues":
        return KeyValues(self.keys[rows], self.values[rows], self.length)


def to_float32(x: Tensor) -> Tensor:
    """Float32 or wider, as a softmax over a vocabulary needs."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require_eval(m: nn.Module) -> None:
    if m.training:
        raise ValueError(f"{type(m).__name__}: expected eval mode, got training mode (dropout is on); call m.eval()")


@torch.no_grad()
def generate(m: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 128,
             num_beams: int = 1, eos_token_id: int | Sequence[int] | None = None,
             pad_token_id: int | None = None) -> Tensor:
    """Greedy search, or with `num_beams` > 1 transformers' beam search (length_penalty 1, early_stopping False).

    input_ids (B, T), padded on the left where attention_mask (B, T) is 0. Returns prompts and new ids, (B, T + at most
    max_new_tokens), with pad_token_id (else the first eos_token_id) after an EOS, any of eos_token_id."""
    require_eval(m)
    if max_new_tokens < 1 or num_beams < 1:
        raise ValueError(f"generate: expected 1 or more new tokens and beams, got {max_new_tokens} and {num_beams}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not mask[:, -1].all():
        raise ValueError("generate: expected padding on the left, got a prompt with padding at its end")
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    pad = pad_token_id if pad_token_id is not None else (eos or [0])[0]
    eos = torch.tensor(eos, dtype=torch.int64, device=input_ids.device)
    with fast.packed_weights(m), fast.compiled_where(False, m):
        if num_beams > 1:
            return _beam_search(m, input_ids, mask, max_new_tokens, num_beams, eos, pad)
        return _greedy(m, input_ids, mask, max_new_tokens, eos, pad)


def prefill(m: nn.Module, prompts: Tensor, mask: Tensor, capacity: int, last: int = 1) -> tuple:
    """Logits (B, last, V) of the prompts' last positions, the mask (B, T) of their cache, and the cache, of `capacity`
    tokens. What all prompts (B, T) begin with is read once, and precedes their padding, on the left."""
    B, T = prompts.shape
    cache, i = m.new_cache(B, capacity), torch.arange(T, device=prompts.device)
    start = T - mask.sum(1, keepdim=True)  # (B, 1)
    shifted = prompts.gather(1, (start + i).clamp(max=T - 1))  # (B, T): as if padded on the right
    alike = (shifted == shifted[:1]).all(0).int().cumprod(0).sum()
    left = B > 1 and (mask == (i >= start)).all()
    common = max(int(min(alike, T - start.max() - last)), 0) if left else 0
    if common:
        m(shifted[:1, :common], cache=(shared := m.new_cache(1, common)))
        for kv, once in zip(cache, shared, strict=True):
            for places, x in zip(kv.grow(common), (once.keys, once.values), strict=True):
                places.copy_(x)
        mask = ((i < common) | (i >= start + common)).to(mask.dtype)
    return m(prompts[:, common:], mask, cache=cache, last=last), mask, cache


def _greedy(m: nn.Module, prompts: Tensor, mask: Tensor, max_new: int, eos: Tensor, pad: int) -> Tensor:
    B, T = prompts.shape
    out = F.pad(prompts, (0, max_new), value=pad)
    rows, unfinished = torch.arange(B, device=out.device), torch.ones(B, dtype=torch.bool, device=out.device)
    logits, mask, cache = prefill(m, prompts, mask, T + max_new)
    for end in range(T, T + max_new):
        new = logits[:, -1].max(-1, keepdim=True).indices  # (rows, 1); argmax takes four times as long on a CPU
        out[rows[unfinished], end] = new[unfinished, 0]
        unfinished &= ~torch.isin(new[:, 0], eos)
        if end + 1 == T + max_new or not unfinished.any():
            return out[:, : end + 1]
        if 1 < unfinished.sum() <= 7 * len(rows) // 8:  # an eighth are done: drop them (one row compiles anew)
            new, mask, rows = new[unfinished], mask[unfinished], rows[unfinished]
            cache, unfinished = [kv.select(unfinished) for kv in cache], unfinished[unfinished]
        mask = F.pad(mask, (0, 1), value=1)
        with fast.compiled_where(True, m):
            logits = m(new, mask, cache=cache)


def _beam_search(m: nn.Module, prompts: Tensor, mask: Tensor, max_new: int, K: int, eos: Tensor, pad: int) -> Tensor:
    """Keeps each prompt's K likeliest continuations; a finished one scores log p / its new tokens. A prompt is done
    when its K finished ones all score better than an open one could at its present length."""
    (B, T), device = prompts.shape, prompts.device
    each = torch.arange(B, device=device)[:, None] * K  # (B, 1): the first of a prompt's rows, among B·K
    running = prompts[:, None].repeat(1, K, 1)  # (B, K, T…)
    done = torch.full((B, K, T + max_new), pad, device=device)
    scores, done_scores = torch.full((2, B, K), -1e9, device=device)
    scores[:, 0] = 0  # at first the K beams are one
    improving = torch.ones(B, 1, dtype=torch.bool, device=device)
    logits, mask, cache = prefill(m, prompts, mask, T + max_new)
    rows = each.expand(B, K).flatten() // K  # read once, continued by K beams
    logits, mask, cache = logits[rows], mask[rows], [kv.select(rows) for kv in cache]
    most = min(max(2, 1 + len(eos)) * K, K * logits.shape[-1])  # however many end here, K go on
    for n in range(1, max_new + 1):
        logp = logits[:, -1].float().log_softmax(-1).view(B, K, -1) + scores[..., None]
        top, index = logp.flatten(1).topk(most)
        parent, token = torch.unravel_index(index, logp.shape[1:])
        grown = torch.cat((running.take_along_dim(parent[..., None], 1), token[..., None]), -1)
        ends = torch.isin(token, eos) | (n == max_new)

        finished = torch.where(ends & improving, top / n, -1e9)[:, :K]  # only the K best may finish
        pool = torch.cat((done, F.pad(grown[:, :K], (0, max_new - n), value=pad)), 1)
        done_scores, best = torch.cat((done_scores, finished), 1).topk(K)
        done = pool.take_along_dim(best[..., None], 1)

        scores, best = torch.where(ends, -1e9, top).topk(K)
        running = grown.take_along_dim(best[..., None], 1)
        improving &= scores[:, :1] / n > done_scores[:, -1:]
        if not improving.any() or ends.all():
            break
        rows = (each + parent.gather(1, best)).flatten()
        cache = [kv.select(rows) for kv in cache]
        mask = F.pad(mask, (0, 1), value=1)
        with fast.compiled_where(True, m):
            logits = m(running[:, :, -1].reshape(-1, 1), mask, cache=cache)
    ended = torch.isin(done[:, 0, T:T + n], eos)
    longest = torch.where(ended.any(1), ended.int().argmax(1) + 1, n).max()  # with its EOS
    return done[:, 0, :T + int(longest)]
