from trainkit import corpus

__all__ = ["corpus"]
