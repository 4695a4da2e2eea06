"""FP8 layers once more, from plain torch alone: quantise, dequantise, multiply in fp64. Shares no code with ours."""

import torch
import torch.nn.functional as F


def tile(x, dims, pow2=False):
    """One tile through E4M3 and back."""
    scale = (x.float().abs().amax(dims, keepdim=True) / 448).clamp_min(2.0**-126)
    if pow2:
        mantissa, exponent = torch.frexp(scale)  # mantissa in [½, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def rows(x, pow2=False):
    """1×128 tiles."""
    return torch.cat([tile(t, (-1,), pow2) for t in x.split(128, -1)], -1)


def columns(x, pow2=False):
    """128×1 tiles."""
    return torch.cat([tile(t, (0,), pow2) for t in x.split(128, 0)], 0) if len(x) else x.float()


def blocks(w):
    """128×128 blocks."""
    return torch.cat([torch.cat([tile(t, (-1, -2)) for t in r.split(128, -1)], -1) for r in w.split(128, -2)], -2)


def e5m6(x):
    """1×128 tiles with power-of-two scales, six bits of mantissa, exponents from −14."""

    def one(t):
        m, e = torch.frexp((t.float().abs().amax(-1, keepdim=True) / 448).clamp_min(2.0**-126))
        scale = torch.ldexp(torch.ones_like(m), e - (m == 0.5).int()).double()
        v = t.double() / scale
        step = torch.exp2((torch.frexp(v)[1] - 1).clamp_min(-14).double() - 6)
        return torch.round(v / step) * step * scale

    return torch.cat([one(t) for t in x.split(128, -1)], -1).float()


def product(a, b):
    return a.double() @ b.double()


def linear(x, w, dy, after_attention=False):
    """y, dx, dw. No intermediate result is quantised, so all operands are exact."""
    kept = e5m6(x) if after_attention else rows(x)
    return (
        product(rows(x, after_attention), blocks(w).t()),
        product(rows(dy), blocks(w)),
        product(columns(dy).t(), columns(kept, after_attention)),
    )


def swiglu(x, gate, up, down, dy, weight=None, pow2=False):
    """y, dx, dgate, dup, ddown (and the gradient of `weight`, one number a row) of one SwiGLU network."""
    dtype = x.dtype

    def r(t):
        return t.to(dtype).double()  # what is stored in between has the activations' dtype

    a = torch.ones(len(x), 1) if weight is None else weight[:, None]
    X, wg, wu, wd = rows(x, pow2), blocks(gate), blocks(up), blocks(down)
    g, u = r(product(X, wg.t())), r(product(X, wu.t()))
    y = product(rows(r(F.silu(g) * u * a), pow2), wd.t())
    G, U = rows(g, pow2).double().requires_grad_(), rows(u, pow2).double().requires_grad_()
    DY = rows(dy, pow2)
    dh = r(product(DY, wd))
    h = F.silu(G) * U
    dg, du = torch.autograd.grad(h, (G, U), dh * a)
    dx = r(product(rows(dg, pow2), wg)) + r(product(rows(du, pow2), wu))
    XC = columns(X, pow2)
    dgate, dup = product(columns(dg, pow2).t(), XC), product(columns(du, pow2).t(), XC)
    # In the experts the gradient travels as 1×128 codes, which are requantised.
    ddown = product(columns(DY if pow2 else dy, pow2).t(), columns(h.detach() * a, pow2))
    return y, dx, dgate, dup, ddown, (h.detach() * dh).sum(-1)


def experts(x, gates, counts, gate, up, down, dy):
    """y, dx, dgates, dgate, dup, ddown; every expert's rows one after another, tiles of its own."""
    parts, start = [], 0
    for e, n in enumerate(counts.tolist()):
        at = slice(start, start + n)
        parts.append(swiglu(x[at], gate[e], up[e], down[e], dy[at], gates[at], pow2=True))
        start += n
    y, dx, dgate, dup, ddown, dgates = zip(*parts)
    return torch.cat(y), torch.cat(dx), torch.cat(dgates), torch.stack(dgate), torch.stack(dup), torch.stack(ddown)
