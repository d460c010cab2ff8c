r"""Run a forward pass with nothing cut out of its derivative: ``detach()`` as the identity it is.

A model that is trained layer by layer detaches what it hands on, so that no layer's loss reaches
the layers below. Its outputs follow those layers all the same: the gradient that trains it comes
from one Jacobian, what its outputs do from another, of the same function without the cuts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

_CUTS: frozenset[Any] = frozenset({Tensor.detach, torch.detach, Tensor.data.__get__})  # pyrefly: ignore
_NUMBERS: frozenset[Any] = frozenset(
    {Tensor.numpy, Tensor.__array__, Tensor.__float__, Tensor.__int__, Tensor.__bool__}
)
"""What torch gives of a tensor without a graph only, or warns of."""


class _Uncut(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _CUTS and _is_followed(args[0]):
            return args[0].view_as(args[0])  # not itself: flags set on it are to stay there
        if func is torch._C._set_grad_enabled and not args[0]:
            return None  # torch.no_grad() begins
        if func in _NUMBERS:
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))


def _is_followed(tensor: Tensor) -> bool:
    """Whether a derivative may be taken through a tensor, by autograd or by ``torch.func``."""
    return tensor.requires_grad or is_functorch_wrapped_tensor(tensor)


@contextlib.contextmanager
def uncut() -> Iterator[None]:
    """Inside, ``detach()``, ``.data`` and ``torch.no_grad()`` let derivatives through.

    Values are as ever. ``torch.inference_mode()`` and functions with a backward pass of their own
    are as they were.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> with uncut():
        ...     y = x * x.detach()
        >>> torch.autograd.grad(y, x)
        (tensor(6.),)
    """
    with _Uncut():
        yield
