"""Which layers of a model train in FP8: the one switch (report §3.3.1).

In FP8 are the products of MLA's projections, of the dense and shared SwiGLU networks and of the routed experts: nearly
all the arithmetic there is. Embedding, head, router, norms and attention stay as they are, for they are sensitive and
cost little; and so does `eh_proj` of an MTP module, which the released checkpoint keeps in BF16.
"""

from __future__ import annotations

from torch import nn

from dsv3_book.fp8.experts import Fp8Experts
from dsv3_book.fp8.linear import Fp8Linear, Fp8SwiGLU
from dsv3_book.model import ops
from dsv3_book.model.experts import Experts
from dsv3_book.model.mla import MLA


def use_fp8(model: nn.Module) -> list[str]:
    """Puts FP8 products into every module of `model` that trains in FP8; returns the names of their weights.

    Parameters and `state_dict` stay as they are: the fp32 master weights, quantised when they have changed. Weights
    changed behind autograd's back (`p.data.copy_`) are not seen to change.
    """
    names: list[str] = []
    for name, module in model.named_modules():
        inside = module.named_parameters(name)
        if isinstance(module, MLA):
            for child in module.children():
                if isinstance(child, ops.Linear):
                    child.product = Fp8Linear(after_attention=child is module.o_proj)
            names += [n for n, p in inside if p.dim() == 2]  # the latents' norms are not among them
        elif isinstance(module, ops.SwiGLU):
            module.product = Fp8SwiGLU()
            names += [n for n, _ in inside]
        elif isinstance(module, Experts):
            module.product = Fp8Experts()
            names += [n for n, _ in inside]
    return names
