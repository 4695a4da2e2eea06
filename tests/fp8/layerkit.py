"""What the tests of the FP8 layers share."""

import torch


def noise(seed, *shape, dtype=torch.float32):
    """Numbers of varied size: each row and column has a magnitude of its own."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g)
    for axis in range(len(shape)):
        sizes = [1] * len(shape)
        sizes[axis] = shape[axis]
        x = x * torch.randn(sizes, generator=g).exp()
    return x.to(dtype)


def size(tensors):
    """Bytes of these tensors' memory, shared memory counted once."""
    return sum(t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in tensors}.values())
