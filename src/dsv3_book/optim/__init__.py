"""The optimiser (report §4.2): AdamW on FP32 master weights, and clipping by the global norm."""

from dsv3_book.optim.adamw import adamw, optimizer_tensors
from dsv3_book.optim.clip import clip_by_global_norm, global_norm

__all__ = ["adamw", "clip_by_global_norm", "global_norm", "optimizer_tensors"]
