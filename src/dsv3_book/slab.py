"""A box of a larger tensor, so that any rank can hold any part, and read it from whatever parts a file holds.

    the whole [8, …]        rank 0 holds [0:4]     rank 1 holds [4:8]          saved by two ranks
                            rank 0 [0:3]    rank 1 [3:6]    rank 2 [6:8]       read by three

A pipeline stage holds whole tensors of some layers, an expert parallel rank a range of a stack of experts, a ZeRO-1
rank pieces of flattened moments. All of these are boxes; to fill one from a file is to copy where it meets the file's.

The two planners tell torch.distributed.checkpoint about them: what this rank writes (boxes that several ranks hold
alike are written once, by the one with the least to write), and what it reads.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True, eq=False)
class Slab:
    """This rank's box of a tensor.

    tensor: the values here, of any number of axes; loading fills it in place.  shape: of the whole.  offset: where the
    box begins, on each axis.

    Raises:
        ValueError: the box doesn't lie in the whole.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = tuple(self.tensor.shape)
        same = len(sizes) == len(self.shape) == len(self.offset)
        if not same or any(o < 0 or o + n > s for n, s, o in zip(sizes, self.shape, self.offset, strict=True)):
            raise ValueError(f"a box of shape {sizes} at {self.offset} does not lie in a tensor of shape {self.shape}")

    @property
    def box(self) -> Box:
        """Where it lies."""
        return Box(tuple(self.offset), tuple(self.tensor.shape))


Value = Tensor | Slab | Sequence[Slab]  # what stands under a name: the whole, a box of it, or several


def slabs(value: Value) -> list[Slab]:
    """The boxes of a value, detached; empty ones (a rank that got no share) are left out."""
    if isinstance(value, Tensor):
        value = Slab(value, tuple(value.shape), (0,) * value.dim())
    parts = [value] if isinstance(value, Slab) else list(value)
    parts = [replace(slab, tensor=slab.tensor.detach()) for slab in parts]
    return [slab for slab in parts if slab.tensor.numel() or not math.prod(slab.shape)]


# Boxes ---------------------------------------------------------------------------------------------------------------
class Box(NamedTuple):
    """offset and sizes, on each axis."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + n}" for o, n in zip(self.offset, self.sizes, strict=True)) + "]"

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def without(box: Box, other: Box) -> list[Box]:
    """What is left of `box` where `other` isn't: at most two boxes an axis."""
    begin = [max(a, b) for a, b in zip(box.offset, other.offset, strict=True)]
    end = [min(a + n, b + m) for a, n, b, m in zip(box.offset, box.sizes, other.offset, other.sizes, strict=True)]
    if any(b >= e for b, e in zip(begin, end, strict=True)):
        return [box]
    left = []
    offset, sizes = list(box.offset), list(box.sizes)
    for axis, (b, e) in enumerate(zip(begin, end, strict=True)):
        stop = offset[axis] + sizes[axis]
        for low, high in ((offset[axis], b), (e, stop)):
            if low < high:
                left.append(
                    Box(
                        (*offset[:axis], low, *offset[axis + 1 :]),
                        (*sizes[:axis], high - low, *sizes[axis + 1 :]),
                    )
                )
        offset[axis], sizes[axis] = b, e - b  # what remains to be cut lies within `other` on this axis
    return left


def uncovered(box: Box, others: Iterable[Box]) -> list[Box]:
    """What of `box` none of `others` holds."""
    left = [box] if box.numel else []
    for other in sorted(others):
        left = [part for piece in left for part in without(piece, other)]
        if not left:
            break
    return left


def boxes_of(entry: TensorStorageMetadata) -> list[Box]:
    """The boxes that a file holds of a tensor."""
    return [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]


# Planners ------------------------------------------------------------------------------------------------------------
class Writing(SavePlanner):
    """What one rank writes of its boxes; rank 0's says who writes what."""

    def set_up_planner(self, state_dict: Mapping[str, Value], storage_meta=None, is_coordinator: bool = False) -> None:
        """Raises ValueError if one rank holds two boxes that begin at the same place."""
        self.boxes = by_place(state_dict)

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(name, slab) for (name, _), slab in self.boxes.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Every box once, and the file's table of contents.

        Raises:
            ValueError: the ranks' boxes don't make up whole tensors, or they disagree about shape or dtype.
        """
        require_whole(all_plans)
        return create_default_global_save_plan(spread(all_plans))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self.boxes[_place(write_item.index)].tensor


class Reading(LoadPlanner):
    """What one rank reads to fill its boxes. (`checkpoint.load` has seen that the file holds them.)"""

    def set_up_planner(self, state_dict: Mapping[str, Value], metadata: Metadata | None = None, is_coordinator=False):
        assert metadata is not None
        self.boxes, self.table = by_place(state_dict), metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for (name, _), slab in self.boxes.items():
            entry = self.table[name]
            assert isinstance(entry, TensorStorageMetadata)  # the reader refuses others
            items += create_read_items_for_chunk_list(name, entry, [_chunk(slab)])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self.boxes[_place(read_item.dest_index)].tensor
        for axis, (begin, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(axis, begin, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


Place = tuple[str, tuple[int, ...]]  # a name, and where a box of it begins


def by_place(values: Mapping[str, Value]) -> dict[Place, Slab]:
    """All boxes by name and offset, by which torch tells them apart too."""
    found: dict[Place, Slab] = {}
    for name, value in values.items():
        for slab in slabs(value):
            place = name, tuple(slab.offset)
            if place in found:
                raise ValueError(f"two boxes of {name} begin at {slab.offset} on one rank: give each once")
            found[place] = slab
    return found


def require_whole(plans: Sequence[SavePlan]) -> None:
    """Raises ValueError unless all ranks' boxes, alike ones counted once, lie beside each other and leave no gap."""
    boxes: dict[str, set[Box]] = {}
    kinds: dict[str, set[tuple[tuple[int, ...], torch.dtype]]] = {}
    for name, data in ((item.index.fqn, _data(item)) for plan in plans for item in plan.items):
        kinds.setdefault(name, set()).add((tuple(data.size), data.properties.dtype))
        boxes.setdefault(name, set()).add(Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes)))
    for name, held in boxes.items():
        if len(kinds[name]) > 1:
            raise ValueError(f"the ranks disagree about {name}: {sorted(map(str, kinds[name]))}")
        (shape, _) = next(iter(kinds[name]))
        whole = Box((0,) * len(shape), shape)
        if gaps := uncovered(whole, held):
            raise ValueError(f"no rank holds {gaps[0]} of {name} {list(shape)}: it could not be loaded again")
        if sum(box.numel for box in held) > whole.numel:
            raise ValueError(f"boxes of {name} {list(shape)} overlap: {', '.join(map(str, sorted(held)[:6]))}")


def spread(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Plans in which every box appears once: what several ranks hold goes, largest first, to who has least to write.

    (torch's own choice weighs a box as if it were the whole tensor.)
    """
    holders: dict[Place, list[int]] = {}
    items: dict[Place, WriteItem] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders.setdefault(_place(item.index), []).append(rank)
            items[_place(item.index)] = item
    load = [0] * len(plans)
    mine: list[list[WriteItem]] = [[] for _ in plans]
    for place in sorted(items, key=lambda p: (len(holders[p]) > 1, -_bytes(items[p]))):
        rank = min(holders[place], key=load.__getitem__)
        load[rank] += _bytes(items[place])
        mine[rank].append(items[place])
    return [replace(plan, items=chosen) for plan, chosen in zip(plans, mine, strict=True)]


def _place(index: MetadataIndex) -> Place:
    return index.fqn, tuple(index.offset or ())


def _data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _bytes(item: WriteItem) -> int:
    data = _data(item)
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _chunk(slab: Slab) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(slab.offset), slab.tensor.shape)


def _write_item(name: str, slab: Slab) -> WriteItem:
    data = TensorWriteData(_chunk(slab), TensorProperties(slab.tensor.dtype), torch.Size(slab.shape))
    return WriteItem(MetadataIndex(name, slab.offset), WriteItemType.SHARD, tensor_data=data)
