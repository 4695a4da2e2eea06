"""Who stands where: pipeline, data and expert parallel ranks on nodes, and the groups they talk in (report §3.1, §3.2).

    rank = ((pipeline rank · dp/ep + replica) · ep) + expert rank            node = rank // ranks per node

What travels most is nearest: the ranks that share a layer's experts stand side by side, on as few nodes as they fit on;
pipeline ranks, which pass one tensor per micro-batch, are furthest apart. Expert parallel ranks are data parallel ranks
seen otherwise: each works on micro-batches of its own, and together they hold one set of experts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

GROUPS = {
    "pp": ("pp",),  # the stages of one pipeline
    "dp": ("edp", "across", "inside"),  # hold the same parameters, experts excepted
    "edp": ("edp",),  # hold the same experts
    "ep": ("across", "inside"),  # hold one set of experts together
    "across": ("across",),  # of those, one on every node: the same place in the node
    "inside": ("inside",),  # of those, the ones on this node
}


@dataclass(frozen=True)
class Layout:
    """pp · dp ranks on nodes of `ranks_per_node`, experts over ep of the dp ranks. Pure arithmetic, for any size.

    Raises:
        ValueError: a number is below 1, ep doesn't divide dp, or the ep ranks neither fill whole nodes nor share one.
    """

    pp: int
    dp: int
    ep: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "ep", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give at least 1")
        if self.dp % self.ep:
            raise ValueError(f"ep = {self.ep} doesn't divide dp = {self.dp}: experts are shared by data parallel ranks")
        if self.ep % self.ranks_per_node and self.ranks_per_node % self.ep:
            raise ValueError(
                f"ep = {self.ep} with {self.ranks_per_node} ranks per node: the ranks that share experts must fill "
                "whole nodes, or several such groups exactly one: let one number divide the other"
            )

    @property
    def world(self) -> int:
        return self.pp * self.dp

    @property
    def axes(self) -> dict[str, int]:
        """The mesh's axes, slowest first, and their lengths."""
        inside = min(self.ep, self.ranks_per_node)
        return {"pp": self.pp, "edp": self.dp // self.ep, "across": self.ep // inside, "inside": inside}

    def ranks(self, group: str, rank: int) -> list[int]:
        """The ranks of one of GROUPS that `rank` belongs to, ascending."""
        return next(ranks for ranks in self.partition(group) if rank in ranks)

    def partition(self, group: str) -> list[list[int]]:
        """All ranks, by the group of that name they belong to."""
        names = list(self.axes)
        along = [names.index(name) for name in GROUPS[group]]
        rest = [i for i in range(len(names)) if i not in along]
        grid = torch.arange(self.world).view(*self.axes.values()).permute(*rest, *along)
        return grid.flatten(len(rest)).flatten(0, -2).tolist()

    def index(self, group: str, rank: int) -> int:
        """Which of its group's ranks `rank` is."""
        return self.ranks(group, rank).index(rank)

    def node(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def holders(self, rank: int, expert: bool, mirrored: bool) -> list[int]:
        """The ranks that hold the same parameter as `rank`: an expert's, or any other. `mirrored`: the schedule gives
        pipeline ranks r and P−1−r the same stages, as DualPipe does."""
        ranks = self.ranks("edp" if expert else "dp", rank)
        if not mirrored:
            return ranks
        stage = rank // self.dp
        return sorted({r + (s - stage) * self.dp for r in ranks for s in (stage, self.pp - 1 - stage)})


@dataclass(frozen=True)
class Mesh:
    """This process's place in a layout, and its groups. `groups` and `devices` hold None where nobody was joined."""

    layout: Layout
    rank: int
    groups: dict[str, dist.ProcessGroup | None]
    devices: DeviceMesh | None
    timeout: timedelta | None = None

    def __getattr__(self, name: str) -> dist.ProcessGroup | None:
        """`mesh.ep` and so on: the group of that name."""
        if name in GROUPS:
            return self.groups[name]
        raise AttributeError(name)

    def index(self, group: str) -> int:
        """Which of its group's ranks this process is."""
        return self.layout.index(group, self.rank)

    def size(self, group: str) -> int:
        return len(self.layout.ranks(group, self.rank))

    @property
    def node(self) -> int:
        return self.layout.node(self.rank)

    def close(self) -> None:
        """Gives up the groups, for processes that go on with another mesh."""
        for group in {id(group): group for group in self.groups.values() if group is not None}.values():
            dist.destroy_process_group(group)
        self.groups.clear()


def make_mesh(
    pp: int = 1, dp: int | None = None, ep: int = 1, ranks_per_node: int | None = None, timeout: float | None = None
) -> Mesh:
    """One `DeviceMesh` with the axes of `Layout.axes`, over all processes; all must call it.

    dp: None takes what is left of the processes.  ranks_per_node: None asks the launcher; another number plays several
    nodes on one machine.  timeout: of the groups' messages, seconds (None: that of the default group).

    Raises:
        ValueError: the numbers don't fit the number of processes, or each other.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if dp is None:
        if pp < 1 or world % pp:
            raise ValueError(f"{world} processes don't divide into pipelines of pp = {pp}")
        dp = world // pp
    if pp * dp != world:
        raise ValueError(
            f"pp · dp = {pp} · {dp} = {pp * dp}, but there are {world} processes: start {pp * dp}, or change one"
        )
    layout = Layout(pp, dp, ep, node_size(ranks_per_node))
    if not dist.is_initialized():
        return Mesh(layout, 0, dict.fromkeys(GROUPS), None)
    limit = timedelta(seconds=timeout) if timeout else default_timeout()
    groups = {name: _mine([dist.new_group(ranks, limit) for ranks in layout.partition(name)]) for name in GROUPS}
    if pp > 1 and dist.get_backend() == "nccl":  # for what travels back: see `pipeline/transfers.py`
        groups["pp back"] = _mine([dist.new_group(ranks, limit) for ranks in layout.partition("pp")])
    grid = torch.arange(world).view(*layout.axes.values())
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    devices = DeviceMesh.from_group(
        [groups[axis] for axis in layout.axes], kind, mesh=grid, mesh_dim_names=tuple(layout.axes)
    )
    return Mesh(layout, dist.get_rank(), dict(groups), devices, limit)


def _mine(groups: list[dist.ProcessGroup]) -> dist.ProcessGroup:
    return next(group for group in groups if group != dist.GroupMember.NON_GROUP_MEMBER)


def default_timeout() -> timedelta | None:
    """The timeout the default group was made with; new groups would otherwise get torch's own, half an hour on gloo."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    return getattr(dist.group.WORLD._get_backend(device).options, "_timeout", None)  # type: ignore[union-attr]


def node_size(ranks_per_node: int | None = None) -> int:
    """Ranks per node: as given, else as the launcher says (LOCAL_WORLD_SIZE), else all ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    size = ranks_per_node if ranks_per_node is not None else int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if size < 1:
        raise ValueError(f"{size} ranks per node: give at least 1")
    return size


def link(here: int, there: int, ranks_per_node: int) -> str:
    """How one rank reaches another: "self", "nvlink" (same node) or "ib"."""
    if here == there:
        return "self"
    return "nvlink" if here // ranks_per_node == there // ranks_per_node else "ib"
