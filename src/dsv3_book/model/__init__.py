"""The V3 model, by the released checkpoint's names (report §2)."""

from dsv3_book.model.transformer import Losses, Part, Transformer

__all__ = ["Losses", "Part", "Transformer"]
