"""What was sent over which kind of link: counted as it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
        for link, n in zip(links, copies, strict=True):
            self.links[link] += Count(n, n * row_bytes)

    def add_metadata(self, links: Sequence[str], entries: Sequence[int], entry_bytes: int) -> None:
        """Whatever else left over `links[i]`, entries[i] of `entry_bytes` each."""
        for link, n in zip(links, entries, strict=True):
            self.links[link] += Count(metadata=n * entry_bytes)

    def clear(self) -> None:
        """Starts counting anew."""
        self.links = {link: Count() for link in LINKS}
