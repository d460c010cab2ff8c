"""Kernels and second moments as other libraries compute them; each is imported when it is used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from poprisk.ntk import entk
from poprisk.optim.adamw import PopRiskAdamW


def poprisk_kernel(model: nn.Module, x: Tensor) -> Tensor:
    """From factors."""
    return entk(model, x).dense()


def torch_func_kernel(model: nn.Module, x: Tensor) -> Tensor:
    """Per-example Jacobians by ``vmap(jacrev)``, contracted parameter by parameter."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one(params: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, params, (example[None],))[0]

    jacobians = vmap(jacrev(one), (None, 0))(params, x)
    rows = [j.flatten(2).flatten(0, 1) for j in jacobians.values()]
    total = rows[0] @ rows[0].T
    for j in rows[1:]:
        total += j @ j.T
    return total


def nngeometry_kernel(model: nn.Module, x: Tensor) -> Tensor:
    """Nngeometry's Gram matrix; it comes with the outputs first."""
    from nngeometry import GramMatrix

    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=len(x))

    def outputs(inputs: Tensor, _: Tensor) -> Tensor:
        return model(inputs)

    gram = GramMatrix(model, loader, function=outputs)
    return gram.to_torch().permute(1, 0, 3, 2).flatten(2).flatten(0, 1)


def curvlinops_kernel(model: nn.Module, x: Tensor) -> Tensor:
    """Curvlinops' Jacobian operator times its adjoint."""
    from curvlinops import JacobianLinearOperator

    outputs = model(x).shape[1]
    batch = [(x, torch.zeros(len(x), outputs))]
    jacobian = JacobianLinearOperator(model, list(model.parameters()), batch)
    return jacobian @ (jacobian.adjoint() @ torch.eye(outputs * len(x)))


KERNELS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "poprisk": poprisk_kernel,
    "torch.func": torch_func_kernel,
    "nngeometry": nngeometry_kernel,
    "curvlinops": curvlinops_kernel,
}

Step = Callable[[], Any]


def plain_moments(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A forward and a backward pass, no statistics."""

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return step


def poprisk_moments(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Gradients and squares of every example's share, for ``variance="exact"``."""
    optimizer = PopRiskAdamW(model.parameters(), variance="exact")

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))

    return step


def backpack_moments(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """BackPACK's sums of squared gradients; sequential models only."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    if not isinstance(model, nn.Sequential):
        raise TypeError("BackPACK needs a module that it can extend.")
    own, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())

    def step() -> None:
        own.zero_grad()
        value = loss(own(x), y)
        with backpack(SumGradSquared()):
            value.backward()

    return step


def opacus_moments(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Opacus' per-example gradients, squared and summed."""
    from opacus.grad_sample import GradSampleModule

    own = GradSampleModule(copy.deepcopy(model).train(), strict=False)

    def step() -> list[Tensor]:
        own.zero_grad()
        F.cross_entropy(own(x), y).backward()
        return [p.grad_sample.square().sum(0) for p in own.parameters()]

    return step


MOMENTS: dict[str, Callable[[nn.Module, Tensor, Tensor], Step]] = {
    "forward + backward": plain_moments,
    "poprisk": poprisk_moments,
    "BackPACK": backpack_moments,
    "Opacus": opacus_moments,
}
