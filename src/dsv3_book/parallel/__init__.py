"""Many processes, one model: who holds what, and what they exchange."""

from dsv3_book.parallel.data import DataParallel, PeerError

__all__ = ["DataParallel", "PeerError"]
