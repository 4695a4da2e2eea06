"""What was sent over which kind of link: counted as it leaves, and foretold from the routing alone.

`traffic_of` sends nothing and needs no processes, so it answers for 64 ranks on a laptop: how often a token crosses IB
under V3's limit of four nodes, and what more experts per token would cost (report §3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_book.parallel.mesh import link
from dsv3_book.parallel.terms import HEAD_BYTES

SLOT_BYTES = 8  # a slot's copy and its key, int32 both
LINKS = ("self", "nvlink", "ib")


@dataclass
class Count:
    """Over one kind of link: how many rows (token copies), their bytes, and the bytes of all that goes with them."""

    copies: int = 0
    payload: int = 0
    metadata: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.copies + other.copies, self.payload + other.payload, self.metadata + other.metadata)


@dataclass
class Traffic:
    """What left one process, per kind of link: "self" (stays), "nvlink" (inside the node), "ib" (to another node)."""

    links: dict[str, Count] = field(default_factory=lambda: {link: Count() for link in LINKS})

    def __getitem__(self, link: str) -> Count:
        return self.links[link]

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic({link: self[link] + other[link] for link in LINKS})

    def add_rows(self, links: Sequence[str], copies: Sequence[int], row_bytes: int) -> None:
        """Rows that left over `links[i]`, copies[i] of them, of `row_bytes` each."""
        for kind, n in zip(links, copies, strict=True):
            self.links[kind] += Count(n, n * row_bytes)

    def add_metadata(self, links: Sequence[str], entries: Sequence[int], entry_bytes: int) -> None:
        """Whatever else left over `links[i]`, entries[i] of `entry_bytes` each."""
        for kind, n in zip(links, entries, strict=True):
            self.links[kind] += Count(metadata=n * entry_bytes)

    def clear(self) -> None:
        """Starts counting anew."""
        self.links = {link: Count() for link in LINKS}


# Foretold ------------------------------------------------------------------------------------------------------------
def fan_out(experts: Int[Tensor, "N K"], num_experts: int, parts: int) -> Int[Tensor, " N"]:
    """How many of `parts` equal parts of the experts (the nodes, or the ranks) each token reaches."""
    return reached(experts // (num_experts // parts), parts).sum(1)


def reached(part: Int[Tensor, "N K"], parts: int) -> Int[Tensor, "N parts"]:
    """1 where a token has a slot in that part, else 0."""
    return torch.zeros(len(part), parts, dtype=torch.int64).scatter_(1, part, 1)


def traffic_of(
    experts: Int[Tensor, "N K"],
    num_experts: int,
    ranks: int,
    ranks_per_node: int,
    *,
    width: int,
    two_hop: bool,
    fp8: bool = False,
    element_bytes: int = 2,
    gate_bytes: int = 4,
    backward: bool = False,
    source: Int[Tensor, " N"] | None = None,
    rank: int | None = None,
) -> dict[str, Traffic]:
    """What dispatch ("scatter") and combine ("gather") of these tokens send: what `AllToAll.traffic` would count.

    width: D.  two_hop: node-limited in two hops, else direct.  element_bytes: of x (2: bf16).  gate_bytes: of a gate.
    backward: of the gradients instead: "scatter" is combine's backward, "gather" dispatch's, which brings the gates'.
    source: the rank of each token (None: equal contiguous shares).  rank: count what leaves this one (None: all ranks).
    """
    N = len(experts)
    if num_experts % ranks:
        raise ValueError(f"{num_experts} experts don't divide among {ranks} ranks")
    source = torch.arange(N) * ranks // max(N, 1) if source is None else source
    scatter_bytes = width + 4 * -(-width // 128) if fp8 else width * element_bytes
    scatter, gather = Traffic(), Traffic()
    for copies, slots, peers in flows(source, experts // (num_experts // ranks), ranks, ranks_per_node, two_hop):
        for here in range(ranks) if rank is None else [rank]:
            links = [link(here, there, ranks_per_node) for there in range(ranks)]
            scatter.add_rows(links, copies[here].tolist(), scatter_bytes)
            gather.add_rows(links, copies[:, here].tolist(), width * element_bytes)
            if backward:
                gather.add_metadata(links, slots[:, here].tolist(), gate_bytes)
            else:
                scatter.add_metadata(links, peers[here].tolist(), HEAD_BYTES)
                scatter.add_metadata(links, slots[here].tolist(), SLOT_BYTES + gate_bytes)
    return {"scatter": scatter, "gather": gather}


def flows(
    source: Int[Tensor, " N"], owner: Int[Tensor, "N K"], ranks: int, ranks_per_node: int, two_hop: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each hop, from each rank to each [R, R]: copies, slots, and 1 where the two talk at all."""
    place = torch.arange(ranks)
    everybody = torch.ones(ranks, ranks, dtype=torch.int64)
    if not two_hop:
        return [(*_between(source, owner, ranks), everybody)]
    relay = owner // ranks_per_node * ranks_per_node + source[:, None] % ranks_per_node
    across = (place[:, None] % ranks_per_node == place % ranks_per_node).long()
    inside = (place[:, None] // ranks_per_node == place // ranks_per_node).long()
    second = torch.zeros_like(everybody), torch.zeros_like(everybody)
    for node in range(-(-ranks // ranks_per_node)):
        at = owner // ranks_per_node == node  # these slots pass through the token's relay in that node
        some = at.any(1)
        if some.any():
            via = node * ranks_per_node + source[some] % ranks_per_node
            for total, part in zip(second, _between(via, owner[some], ranks, at[some]), strict=True):
                total += part
    return [(*_between(source, relay, ranks), across), (*second, inside)]


def _between(sender: Tensor, owner: Tensor, ranks: int, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Copies and slots from each rank to each, of those slots that are `chosen`."""
    chosen = torch.ones_like(owner, dtype=torch.bool) if chosen is None else chosen
    slots = torch.zeros(len(owner), ranks, dtype=torch.int64).scatter_add_(1, owner, chosen.long())
    zeros = torch.zeros(ranks, ranks, dtype=torch.int64)
    return zeros.index_add(0, sender, slots.clamp(max=1)), zeros.index_add(0, sender, slots)
