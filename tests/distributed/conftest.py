from trainkit import corpus
from workers import pool

__all__ = ["corpus", "pool"]
