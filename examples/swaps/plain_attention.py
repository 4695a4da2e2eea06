r"""Multi-head attention without latents: every head its own keys and values, straight from the hidden state.

    python -m dsv3_book.train --preset tiny --out runs/mha \
        --swap.attention examples/swaps/plain_attention.py:PlainAttention

It has no `decode`, so a sample is written by running `forward` again for every token.
"""

from einops import rearrange
from torch import nn

from dsv3_book.model import ops
from dsv3_book.model.attention import causal_attention
from dsv3_book.model.rope import rotate


class PlainAttention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.heads, self.width = cfg.num_attention_heads, cfg.qk_rope_head_dim
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, ops.Linear(cfg.hidden_size, self.heads * self.width))
        self.o_proj = ops.Linear(self.heads * self.width, cfg.hidden_size)

    def forward(self, x, at):
        q, k, v = (
            rearrange(f(x), "B T (H d) -> B T H d", H=self.heads) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = (t.transpose(1, 2).contiguous() for t in (rotate(q, at), rotate(k, at), v))
        o = causal_attention(q, k, v, self.width**-0.5)
        return self.o_proj(rearrange(o, "B H T d -> B T (H d)"))
