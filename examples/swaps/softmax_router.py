r"""A softmax router, as before DeepSeek-V3: affinities compete, and there is no bias to balance them.

    python -m dsv3_book.train --preset tiny --out runs/softmax \
        --swap.router examples/swaps/softmax_router.py:SoftmaxRouter
"""

import torch
from torch import nn

from dsv3_book.model.router import Routing, gate_weights, select


class SoftmaxRouter(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))

    def forward(self, x):
        cfg = self.cfg
        scores = (x.float() @ self.weight.t()).softmax(-1)
        nobody = torch.zeros(cfg.n_routed_experts, device=x.device)
        experts = select(scores.detach(), nobody, cfg.n_group, cfg.topk_group, cfg.num_experts_per_tok)
        load = torch.bincount(experts.flatten(), minlength=cfg.n_routed_experts).float()
        gates = gate_weights(scores, experts, cfg.norm_topk_prob, cfg.routed_scaling_factor)
        return Routing(experts, gates, scores, load)
