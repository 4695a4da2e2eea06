"""Node-limited all-to-all in two hops (report §3.2).

A token goes once to every node that holds some of its experts, over IB to the rank with its own place in that node, and
from there once to each rank that needs it, over NVLink. Results take the same way back and are added up twice: at the
rank of the experts, then in the node. So a token crosses IB as often as it has nodes (at most 4 in V3), not ranks, and
every rank's IB card carries its share.

What arrives is what the direct all-to-all brings, in the same order; only sums of three and more terms round otherwise.
"""

from __future__ import annotations

from dsv3_book.parallel.all_to_all import Travelling, experts_each, wire_of
from dsv3_book.parallel.mesh import Mesh
from dsv3_book.parallel.transport import Transport


class TwoHop(Travelling):
    """Every token once to each node, then inside the node once to each rank.

    mesh: its "across" and "inside" groups make up "ep". The first hop is under way from the start; the second begins
    when somebody waits (or calls `advance` on the journey), since what to pass on is known only then.

    Raises:
        ValueError: the experts don't divide among the ranks.
        RuntimeError: (from scatter, gather and their `wait`) a peer is gone or too late.
    """

    def __init__(
        self,
        mesh: Mesh,
        num_experts: int,
        *,
        fp8: bool = False,
        asynchronous: bool = True,
        transport: Transport | None = None,
    ) -> None:
        per_node, transport = mesh.layout.ranks_per_node, transport or Transport()
        across = wire_of(mesh.across, per_node, transport, "between nodes")
        inside = wire_of(mesh.inside, per_node, transport, "inside the node")
        width = len(inside.links)
        ranks = len(across.links) * width
        each = experts_each(num_experts, ranks)
        owners = [lambda expert: expert // (each * width), lambda expert: expert // each % width]
        super().__init__([across, inside], owners, num_experts, ranks, mesh.index("ep"), fp8, asynchronous)
