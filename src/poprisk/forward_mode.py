"""Run a model on kernels that torch can differentiate in every way, forward mode included.

Fast paths of torch know their own backward pass at most: attention in evaluation mode (the "fast
path" of ``nn.MultiheadAttention`` and ``nn.TransformerEncoder``, nested tensors), fused scaled dot
products, recurrent layers by oneDNN. Whatever takes ``jvp``, ``vmap`` or ``jacrev`` of a user's
model calls it in :func:`plain_kernels`.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """No fused kernel inside; torch's switches are afterwards as they were.

    Args:
        model: to be called; only what has recurrent layers is kept from oneDNN, which convolutions
            are much faster with.
    """
    prepare_forward_mode()
    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    one_dnn = torch._C._get_mkldnn_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(one_dnn and not recurrent)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(one_dnn)


@functools.cache
def prepare_forward_mode() -> None:
    """Let torch load what forward-mode derivatives need, without its own deprecation warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jvp(torch.sin, (torch.zeros(1),), (torch.zeros(1),))
