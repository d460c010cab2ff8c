"""The derivative rules: from a node of the autograd graph to per-example gradients in factors.

Each rule gives the gradients with respect to one input of a node, or None where it does not apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from poprisk.per_sample.layouts import Layout, shapes
from poprisk.per_sample.terms import OneHot, Outer


class Site(NamedTuple):
    """One use of a parameter with the gradients that arrive there.

    Attributes:
        node: where it is used.
        edge: which input of the node it is.
        layouts: where the examples lie in each output.
        grads: one gradient per output of the node, (k, *shape of the output), or None.
        examples: number of examples b.
        values: number of values k per example.
    """

    node: Any
    edge: int
    layouts: Sequence[Layout | None]
    grads: Sequence[Tensor | None]
    examples: int
    values: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what comes from the parameters."""
        child, index = self.node.next_functions[self.edge]
        return shapes(child)[index]

    def first(self, tensor: Tensor) -> Tensor:
        """(b, k, rows, ...) from (k, ...), laid out like the node's first output."""
        layout = cast(Layout, self.layouts[0])
        return layout.first(tensor, self.examples).transpose(0, 1)

    @property
    def grad(self) -> Tensor:
        """The gradient of the node's first output, (k, *shape)."""
        return cast(Tensor, self.grads[0])


Local = Outer | Tensor
"""Gradients with respect to the input of a node: in factors, or (b, k, *shape)."""


def _reduced(site: Site, grads: Tensor) -> Tensor | None:
    """Sum gradients (k, *output shape) of an elementwise operation over broadcast dimensions."""
    layout = cast(Layout, site.layouts[0])
    padded = (1,) * (grads.ndim - 1 - len(site.shape)) + site.shape
    if padded[layout.dim] != 1:
        return None
    rest = padded[: layout.dim] + padded[layout.dim + 1 :]
    first = site.first(grads)
    dims = [2, *(3 + i for i, n in enumerate(rest) if n == 1)]
    return first.sum(dim=dims).reshape(site.examples, site.values, *site.shape)


def _inputs(site: Site, tensor: Tensor) -> Tensor:
    """(b, rows, ...) of a tensor in which the examples lie like in the output."""
    layout = cast(Layout, site.layouts[0])
    return layout.first(tensor[None], site.examples)[0]


def _matrix_product(site: Site, left: Tensor | None, right: Tensor | None) -> Outer | None:
    """Derivative of left @ right; None stands for the factor that is the parameter."""
    layout = cast(Layout, site.layouts[0])
    cotangent = site.first(site.grad)
    if right is None and left is not None and layout.dim == 0:
        return Outer(cotangent, _inputs(site, left), True, site.shape)
    if left is None and right is not None and layout.dim == 1:
        return Outer(cotangent, _inputs(site, right), False, site.shape)
    return None


def _mm(site: Site) -> Local | None:
    if site.edge == 1:
        return _matrix_product(site, site.node._saved_self, None)
    return _matrix_product(site, None, site.node._saved_mat2)


def _addmm(site: Site) -> Local | None:
    node = site.node
    if site.edge == 0:
        return _reduced(site, site.grad * node._saved_beta)
    scaled = (
        site._replace(grads=[site.grad * node._saved_alpha]) if node._saved_alpha != 1 else site
    )
    if site.edge == 2:
        return _matrix_product(scaled, node._saved_mat1, None)
    return _matrix_product(scaled, None, node._saved_mat2)


def _bmm(site: Site) -> Local | None:
    """Products of stacks of matrices, of which the parameter's belongs to no example."""
    layout = cast(Layout, site.layouts[0])
    right = site.edge == 1
    if layout.dim != (1 if right else 2):
        return None
    cotangent = site.first(site.grad)
    activation = _inputs(site, site.node._saved_self if right else site.node._saved_mat2)
    if site.shape[0] == 1:
        return Outer(cotangent.squeeze(3), activation.squeeze(2), right, site.shape)
    return torch.einsum(
        "bktgo,btgi->bkgio" if right else "bktgo,btgi->bkgoi", cotangent, activation
    )


def _convolution(site: Site) -> Local | None:
    node, layout = site.node, cast(Layout, site.layouts[0])
    if node._saved_transposed or layout.dim != 0 or site.edge == 0:
        return None
    if site.edge == 2:
        return site.first(site.grad).flatten(4).sum(dim=(2, 4))
    positions = site.grad[0, 0, 0].numel() * layout.rows
    inputs, outputs = math.prod(site.shape[1:]), site.shape[0] * site.values
    if node._saved_groups > 1 or positions * (inputs + outputs) > inputs * outputs:
        return _convolution_by_example(site, layout)
    activation = patches(
        node._saved_input,
        site.shape[2:],
        stride=node._saved_stride,
        padding=node._saved_padding,
        dilation=node._saved_dilation,
    )
    cotangent = site.first(site.grad).flatten(4).mT.flatten(2, 3)
    return Outer(cotangent, _inputs(site, activation).flatten(1, 2), False, site.shape)


def _convolution_by_example(site: Site, layout: Layout) -> Tensor:
    """Gradients (b, k, *weight): the images of a batch are groups of one convolution."""
    node, count = site.node, site.grad.shape[1]
    images = node._saved_input
    weight = images.new_empty(count * site.shape[0], *site.shape[1:])
    rows = [
        torch.ops.aten.convolution_backward(
            grad.reshape(1, -1, *grad.shape[2:]),
            images.reshape(1, -1, *images.shape[2:]),
            weight,
            None,
            node._saved_stride,
            node._saved_padding,
            node._saved_dilation,
            False,
            node._saved_output_padding,
            count * node._saved_groups,
            [False, True, False],
        )[1].unflatten(0, (count, -1))
        for grad in site.grad
    ]
    return layout.first(torch.stack(rows), site.examples).sum(dim=2).transpose(0, 1)


def patches(
    images: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What a convolution sees at each position, (n, positions, channels · kernel elements).

    Args:
        images: (n, channels, ...) with any number of spatial dimensions.
        kernel: size of the kernel in each of them.
        stride: steps of the kernel.
        padding: zeros on both sides.
        dilation: distances between elements of the kernel.
    """
    sides = [side for p in reversed(padding) for side in (p, p)]
    windows = torch.nn.functional.pad(images, sides)
    for d, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        windows = windows.unfold(2 + d, (size - 1) * gap + 1, step)[..., ::gap]
    spatial = len(kernel)
    order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
    return windows.permute(order).flatten(1 + spatial).flatten(1, spatial)


def _embedding(site: Site) -> Local | None:
    node = site.node
    if node._saved_scale_grad_by_freq:
        return None
    cotangent = site.first(site.grad)
    indices = _inputs(site, node._saved_indices).flatten(1)
    cotangent = cotangent.reshape(site.examples, site.values, indices.shape[1], cotangent.shape[-1])
    padding = indices == node._saved_padding_idx
    if padding.any():
        cotangent = cotangent.masked_fill(padding[:, None, :, None], 0.0)
    return Outer(cotangent, OneHot(indices, site.shape[0]), True, site.shape)


def _norm(site: Site, normalized: Callable[[Site], Tensor]) -> Local | None:
    """The scale (input 1) and the shift (input 2) of a normalization."""
    if site.edge == 0:
        return None
    return _reduced(site, site.grad * normalized(site) if site.edge == 1 else site.grad)


def _layer_norm(site: Site) -> Local | None:
    node = site.node
    return _norm(site, lambda _: (node._saved_input - node._saved_result1) * node._saved_result2)


def _channels(site: Site, normalized: Tensor) -> Local | None:
    """Scale and shift per channel: (n, channels, ...) summed over all but channels."""
    layout = cast(Layout, site.layouts[0])
    if layout.dim != 0 or site.edge == 0:
        return None
    grads = site.grad * normalized if site.edge == 1 else site.grad
    first = site.first(grads)
    return first.flatten(3).unflatten(3, (site.shape[0], -1)).sum(dim=(2, 4))


def _group_norm(site: Site) -> Local | None:
    node = site.node
    x = node._saved_input
    grouped = x.reshape(len(x), node._saved_group, -1)
    mean, scale = node._saved_result1[..., None], node._saved_result2[..., None]
    return _channels(site, ((grouped - mean) * scale).reshape(x.shape))


def _batch_norm(site: Site) -> Local | None:
    node = site.node
    if node._saved_training:
        return None
    x = node._saved_input
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean, variance = node._saved_running_mean, node._saved_running_var
    scale = (variance + node._saved_eps).rsqrt()
    return _channels(site, (x - mean.reshape(shape)) * scale.reshape(shape))


def _add(site: Site) -> Local | None:
    return _reduced(site, site.grad * (site.node._saved_alpha if site.edge == 1 else 1))


def _subtract(site: Site) -> Local | None:
    return _reduced(site, site.grad * (-site.node._saved_alpha if site.edge == 1 else 1))


def _multiply(site: Site) -> Local | None:
    other = site.node._saved_other if site.edge == 0 else site.node._saved_self
    return _reduced(site, site.grad * other)


def _divide(site: Site) -> Local | None:
    return _reduced(site, site.grad / site.node._saved_other) if site.edge == 0 else None


def _expand(site: Site) -> Local | None:
    return _reduced(site, site.grad)


RULES: dict[str, Callable[[Site], Local | None]] = {
    "AddmmBackward0": _addmm,
    "MmBackward0": _mm,
    "BmmBackward0": _bmm,
    "ConvolutionBackward0": _convolution,
    "EmbeddingBackward0": _embedding,
    "NativeLayerNormBackward0": _layer_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeBatchNormBackward0": _batch_norm,
    "AddBackward0": _add,
    "SubBackward0": _subtract,
    "MulBackward0": _multiply,
    "DivBackward0": _divide,
    "ExpandBackward0": _expand,
}
