"""Which dispatch a layout gets."""

from __future__ import annotations

import torch.distributed as dist

from dsv3_book.model.dispatch import Dispatch, LocalDispatch
from dsv3_book.parallel import deep_ep
from dsv3_book.parallel.all_to_all import AllToAll
from dsv3_book.parallel.mesh import Mesh
from dsv3_book.parallel.transport import Transport
from dsv3_book.parallel.two_hop import TwoHop


def make_dispatch(
    mesh: Mesh,
    num_experts: int,
    *,
    fp8: bool = False,
    asynchronous: bool = True,
    direct: bool = False,
    transport: Transport | None = None,
    max_tokens: int | None = None,
) -> Dispatch:
    """The dispatch of this process's expert parallel group: local if ep is 1; by DeepEP on NCCL where it is installed
    and `max_tokens` is given (see there; rows must then be bf16); else in two hops over several nodes, direct on one
    and, if `direct`, on any number. A transport, since it is there to be watched, keeps DeepEP out."""
    group = mesh.ep
    if mesh.layout.ep == 1 or group is None:
        return LocalDispatch(num_experts)
    if max_tokens and transport is None and dist.get_backend(group) == "nccl" and deep_ep.available():
        return deep_ep.DeepEp(group, num_experts, max_tokens, fp8=fp8)
    if mesh.layout.axes["across"] > 1 and not direct:
        return TwoHop(mesh, num_experts, fp8=fp8, asynchronous=asynchronous, transport=transport)
    per_node = mesh.layout.ranks_per_node
    return AllToAll(
        group, num_experts, ranks_per_node=per_node, fp8=fp8, asynchronous=asynchronous, transport=transport
    )
