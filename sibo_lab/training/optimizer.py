"""AdamW as this project trains with it. It needs torch alone, so that `pip install .` brings it to other loops too."""

import torch
from torch import nn

LAM_PACE = 50  # AdamW moves every number by about its rate: W_down is drawn with size 0.02, λ's log-odds are of size 1


def adamw(m: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW for what is trained in `m`: weights at the rate `lr`, learned λ's log-odds at LAM_PACE times that."""
    groups = [{"params": [], "lr": lr * pace, "pace": pace} for pace in (1, LAM_PACE)]
    for name, p in m.named_parameters():
        if p.requires_grad:
            groups[name.endswith(".lam_logit")]["params"].append(p)
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
