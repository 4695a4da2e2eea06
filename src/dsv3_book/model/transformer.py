"""The whole model: embedding, blocks, final norm, head, and the MTP modules behind them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3_book.config import ModelConfig
from dsv3_book.model import ops
from dsv3_book.model.balance import sequence_balance_loss
from dsv3_book.model.block import Block
from dsv3_book.model.dispatch import Dispatch, LocalDispatch
from dsv3_book.model.experts import Experts, MoE
from dsv3_book.model.mla import Cache
from dsv3_book.model.mtp import MTPModule
from dsv3_book.model.rope import Angles, angles
from dsv3_book.model.router import Routing


class Losses(NamedTuple):
    """What one micro-batch gives the trainer; it minimises `main + λ·mtp + balance`."""

    main: Float[Tensor, ""]  # next-token cross-entropy, nats
    mtp: Float[Tensor, ""]  # mean of the MTP depths' cross-entropies, without λ (0 when there are none)
    balance: Float[Tensor, ""]  # sequence-wise losses summed over the routers, α included
    load: Float[Tensor, "routers E"]  # tokens per expert of every router, in the order of `routers()`


@dataclass(frozen=True)
class Part:
    """Which piece of the model a process holds: some layers, perhaps the embedding, perhaps norm + head + MTP; and of
    those layers all experts, or a contiguous range of them (the `dispatch` must then know where the others are)."""

    layers: range
    embed: bool = True
    head: bool = True
    experts: range | None = None


class Transformer(nn.Module):
    """DeepSeek-V3. `Transformer(cfg)(tokens)` gives the main model's logits, `losses(tokens)` what training needs.

    Parameters carry the released names without their leading "model."; the MTP module of depth j is layer L + j − 1.
    They start as the report says (normal, `initializer_range`; norms at one) from `seed`, each from a generator of its
    own, so a stage that holds a `part` of the model starts with the very numbers the whole would have there.

    Args:
        cfg: the shape.
        seed: of the initial weights.
        dtype: of the parameters. fp32 for training (the master weights); a released checkpoint may stay bf16.
        compute_dtype: of activations and matrix products; the parameters' when None.
        part: the piece to build; everything when None.
        device: where; on "meta" nothing is allocated and nothing initialised.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        part: Part | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.compute_dtype = compute_dtype or dtype
        self.part = part or Part(range(cfg.num_hidden_layers))
        self.dispatch: Dispatch = LocalDispatch(cfg.n_routed_experts)
        with torch.device(device or "cpu"):
            if self.part.embed or (self.part.head and cfg.num_nextn_predict_layers):
                self.embed_tokens = Embedding(cfg)
            self.layers = nn.ModuleDict({str(i): Block(cfg, i, self.part.experts) for i in self.part.layers})
            if self.part.head:
                self.norm = ops.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
                self.lm_head = ops.Linear(cfg.hidden_size, cfg.vocab_size)
                L = cfg.num_hidden_layers
                depths = range(L, L + cfg.num_nextn_predict_layers)
                self.layers.update({str(i): MTPModule(cfg, i, self.part.experts) for i in depths})
            if not self.layers and not self.part.embed and not self.part.head:
                self.register_buffer("nothing", torch.empty(0), persistent=False)
        self.to(dtype)
        if self.device.type != "meta":
            init_weights(self, seed)

    @property
    def device(self) -> torch.device:
        """Where the parameters are; a part without any (a stage that got no layer) has a buffer to show it."""
        return next(chain(self.parameters(), self.buffers())).device

    # Pieces ------------------------------------------------------------------------------------------------------
    def blocks(self) -> list[Block]:
        """The main model's blocks held here, in order."""
        return [self.layers[str(i)] for i in self.part.layers]  # type: ignore[misc]

    def mtp_modules(self) -> list[MTPModule]:
        """The MTP modules held here, depth 1 first."""
        return [m for m in self.layers.values() if isinstance(m, MTPModule)]

    def routers(self) -> list[tuple[str, nn.Module]]:
        """(name, router) of every MoE block held here, MTP's last: the order of `Losses.load`."""
        moe = [(n, b.mlp) for n, b in self.layers.items() if isinstance(b.mlp, MoE)]
        return [(f"layers.{name}.mlp.gate", mlp.gate) for name, mlp in moe]

    def set_recompute(self, enabled: bool) -> None:
        """Whether RMSNorm and the MLA up-projections are recomputed in backward to save memory (report §3.2.3)."""
        for block in self.layers.values():
            block.recompute = block.self_attn.recompute = enabled  # type: ignore[union-attr, assignment]

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Token embeddings in the compute dtype."""
        return self.embed_tokens(tokens).to(self.compute_dtype)

    def angles(self, T: int, start: int = 0) -> Angles:
        """RoPE angles of positions start … start + T − 1."""
        return angles(self.cfg, torch.arange(start, start + T, device=self.device))

    def run_blocks(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], list[Routing]]:
        """This part's blocks, and what their routers chose."""
        at, routings = self.angles(x.shape[1]), []
        for block in self.blocks():
            x, routing = block(x, at, self.dispatch)
            if routing is not None:
                routings.append(routing)
        return x, routings

    # The model ---------------------------------------------------------------------------------------------------
    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the main model for the token after each of the given ones."""
        x, _ = self.run_blocks(self.embed(tokens))
        return self.lm_head(self.norm(x))

    def losses(self, tokens: Int[Tensor, "B width"]) -> Losses:
        """All losses of a micro-batch whose rows hold T inputs, the next token and J more for the MTP depths."""
        T = tokens.shape[1] - 1 - self.cfg.num_nextn_predict_layers
        if T < 1:
            raise ValueError(
                f"losses() got {tokens.shape[1]} tokens a row, but needs at least "
                f"{2 + self.cfg.num_nextn_predict_layers}: T inputs, one target and one more token per MTP depth"
            )
        x, routings = self.run_blocks(self.embed(tokens[:, :T]))
        return self.head_losses(x, tokens, routings)

    def head_losses(self, x: Float[Tensor, "B T D"], tokens: Int[Tensor, "B width"], routings: list[Routing]) -> Losses:
        """Everything behind the last block: final norm, main loss, MTP chain, and the balance of all `routings`."""
        B, T = x.shape[:2]
        hidden = self.norm(x)
        main = self.token_loss(hidden, tokens[:, 1 : T + 1])
        at, mtp, routings = self.angles(T), [], list(routings)
        for j, module in enumerate(self.mtp_modules(), start=1):
            hidden, routing = module.predict(hidden, self.embed(tokens[:, j : T + j]), at, self.dispatch)
            mtp.append(self.token_loss(hidden, tokens[:, j + 1 : T + j + 1]))
            if routing is not None:
                routings.append(routing)
        k, alpha = self.cfg.num_experts_per_tok, self.cfg.aux_loss_alpha
        balance = [sequence_balance_loss(r.scores.view(B, T, -1), k, alpha) for r in routings]
        load = [r.load for r in routings]
        return Losses(
            main,
            torch.stack(mtp).mean() if mtp else main.new_zeros(()),
            torch.stack(balance).sum() if balance else main.new_zeros(()),
            torch.stack(load) if load else main.new_zeros(0, self.cfg.n_routed_experts),
        )

    def token_loss(self, hidden: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Mean cross-entropy of the shared head, in chunks: the [B, T, V] logits never exist at once."""
        return ops.linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())

    @torch.no_grad()
    def decode(self, tokens: Int[Tensor, "B T"], cache: Cache) -> Float[Tensor, "B T V"]:
        """Logits for T new tokens behind those already in `cache`, which grows by them."""
        x, at = self.embed(tokens), self.angles(tokens.shape[1], cache.length)
        for block in self.blocks():
            x = block.decode(x, at, self.dispatch, cache)
        return self.lm_head(self.norm(x))


class Embedding(nn.Module):
    """Rows of `weight` [V, D]. The MTP modules look up the same rows."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.vocab_size, cfg.hidden_size))

    def forward(self, tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        return F.embedding(tokens, self.weight)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Normal with `initializer_range`, norms at one, biases at zero (report §4.2).

    Every matrix has a generator of its own, seeded by (seed, name), and every expert one of its own: who holds what
    doesn't change the numbers.
    """
    std = model.cfg.initializer_range  # type: ignore[union-attr]
    held = {id(p): m.held for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(1.0)
        elif p.dim() == 2:
            p.copy_(torch.randn(p.shape, generator=_generator(seed, name)) * std)  # type: ignore[operator]
        else:
            for place, e in enumerate(held[id(p)]):
                p[place] = torch.randn(p.shape[1:], generator=_generator(seed, f"{name}.{e}")) * std  # type: ignore[operator]
    for name, b in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            b.zero_()


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
