"""The optimiser (report §4.2): AdamW on FP32 master weights, clipping, ZeRO-1 over ranks, the weights' average."""

from dsv3_book.optim.adamw import adamw, optimizer_tensors
from dsv3_book.optim.clip import clip_by_global_norm, global_norm
from dsv3_book.optim.ema import EMA
from dsv3_book.optim.shards import Kind
from dsv3_book.optim.zero import ZeRO1

__all__ = ["EMA", "Kind", "ZeRO1", "adamw", "clip_by_global_norm", "global_norm", "optimizer_tensors"]
