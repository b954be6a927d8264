"""TF32 in the products of a GPU while a network is trained, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["tensor_float32"]


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Whether float32 products and convolutions on a GPU may round their factors to TF32, within the context."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
