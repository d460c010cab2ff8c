r"""The basis of a parameter that is sharded over processes (DTensor).

The averages of :math:`U^\top G V` are cut as the parameter is, the factors and bases by their rows,
so that no process keeps a whole matrix. A step gathers those of one parameter at a time. What a
process keeps of a tensor is a choice of rows :math:`i` and of columns :math:`j` of the matrix, and
it computes no more than that:

.. math:: (U^\top G V)_{ij} = (U_{\cdot i})^\top G\, V_{\cdot j}, \qquad
          (U S V^\top)_{ij} = U_{i \cdot}\, S\, (V_{j \cdot})^\top .
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk.dtensor import (
    ShardLayout,
    agreed,
    gradient_of,
    joined,
    layout_of,
    local,
    split_of,
    spread,
    whole,
)
from poprisk.optim.kronecker import (
    AVERAGES,
    BASES,
    FACTORS,
    NO_PAIR,
    Pair,
    Rotation,
)
from poprisk.optim.matrices import as_matrix
from poprisk.optim.update import state_dtype

Index = slice | Tensor
"""Increasing numbers of rows or of columns."""


class RotationPart(NamedTuple):
    """The basis of a parameter as a process uses it that keeps a part of each tensor there.

    Attributes:
        rotation: the basis, whole.
        layout: of the parameter.
        shape: of the parameter.
        part: shape of what is here of it.
    """

    rotation: Rotation
    layout: ShardLayout
    shape: torch.Size
    part: torch.Size

    def forward(self, tensor: Tensor) -> Tensor:
        """From a whole tensor of the parameter's shape, the part here of it in this basis."""
        left, right = self.rotation
        rows, columns = self._kept()
        x = as_matrix(tensor)
        x = x[rows] if left is None else left[:, rows].mT @ x
        x = x[:, columns] if right is None else x @ right[:, columns]
        return x.reshape(self.part)

    def back(self, tensor: Tensor) -> Tensor:
        """From the parts of a tensor in this basis, the part here of the parameter's own.

        Every process must ask.
        """
        left, right = self.rotation
        rows, columns = self._kept()
        x = as_matrix(whole(joined(tensor, self.shape, self.layout)))
        x = x[rows] if left is None else left[rows] @ x
        x = x[:, columns] if right is None else x @ right[columns].mT
        return x.reshape(self.part)

    def _kept(self) -> tuple[Index, Index]:
        rows, columns = (kept(self.layout, self.shape, rows=rows) for rows in (True, False))
        return rows, columns


def rotation_part(p: Tensor, rotation: Rotation) -> RotationPart:
    """The basis of a sharded parameter, gathered. Every process must ask."""
    layout = layout_of(p)
    assert layout is not None
    gathered = Rotation(*(None if basis is None else whole(basis) for basis in rotation))
    return RotationPart(gathered, layout, p.shape, local(p).shape)


def kept(layout: ShardLayout, shape: torch.Size, *, rows: bool) -> Index:
    """Which rows, or columns, of a tensor of this layout and shape (as a matrix) are here."""
    return _kept(layout, shape, rows, tuple(layout.mesh.get_coordinate()))


@functools.lru_cache(maxsize=4096)
def _kept(layout: ShardLayout, shape: torch.Size, rows: bool, place: tuple[int, ...]) -> Index:
    """By cutting their numbers as the tensor is cut; ``place`` is the process's in the mesh."""
    from torch.distributed.tensor import Replicate

    own = (
        x if x.is_replicate() or (x.dim == 0) == rows else Replicate() for x in layout.placements
    )
    numbers = torch.arange(shape[0] if rows else shape[1:].numel())
    numbers = numbers.view(-1, *(1 for _ in shape[1:])) if rows else numbers.view(1, *shape[1:])
    cut = spread(numbers, layout._replace(placements=tuple(own)))
    here = local(cut).flatten().cpu()
    first, end = (int(here[0]), int(here[-1]) + 1) if len(here) else (0, 0)
    return slice(first, end) if end - first == len(here) else here


def whole_gradient(p: Tensor) -> Tensor:
    """The gradient of a parameter, gathered where it is sharded, in the precision of its state."""
    return whole(gradient_of(p, layout_of(p))).to(state_dtype(p))


def factor_parts(grad: Tensor, p: Tensor, sides: tuple[bool, bool]) -> Pair:
    r"""The rows here of :math:`GG^\top` and :math:`G^\top G`, as DTensors; none unless finite.

    Args:
        grad: G, whole.
        p: its parameter, sharded.
        sides: which rotate.
    """
    layout = layout_of(p)
    assert layout is not None
    g, by_rows = as_matrix(grad), layout.by_rows()
    # None of their numbers exceeds their trace, of which no process sees all.
    if not bool(g.square().sum().isfinite()):
        return NO_PAIR
    left, right = (
        _rows_of_square(x, by_rows) if side else None
        for x, side in zip((g, g.mT), sides, strict=True)
    )
    return left, right


def _rows_of_square(g: Tensor, by_rows: ShardLayout) -> Tensor:
    r"""The rows here of :math:`gg^\top`."""
    shape = torch.Size((len(g), len(g)))
    return joined(g[kept(by_rows, shape, rows=True)] @ g.mT, shape, by_rows)


def change_basis_(
    p: Tensor, state: dict[str, Any], change_: Callable[[dict[str, Any]], None]
) -> None:
    """Change the basis of a sharded parameter in its gathered state, of which each keeps its part.

    All take the parts from the first process: where eigenvalues are close, a last bit decides on
    their vectors, and parts of different bases would be none. Each computes them nevertheless, so
    that all fail where one does.

    Args:
        p: the parameter.
        state: of the parameter.
        change_: changes averages and bases in a state, given whole.
    """
    layout = layout_of(p)
    assert layout is not None
    gathered = {k: whole(state[k]) for k in (*AVERAGES, *FACTORS, *BASES) if k in state}
    change_(gathered)
    for key in (*AVERAGES, *BASES):
        if key in gathered:
            own = layout.by_rows() if key in BASES else layout
            state[key] = spread(agreed(gathered[key], layout), own)


def check_split(p: Tensor, group: dict[str, Any]) -> None:
    """Refuse parameters that are split between processes in ways that hide what is needed.

    Raises:
        ValueError: as no rows and columns can be told, no examples are seen, or there is no sum.
    """
    layout, how = layout_of(p), split_of(p)
    if layout is None:
        if how is not None:
            raise ValueError(
                f"PopRiskSOAP needs rows and columns, but a parameter is {how}; shard the model by "
                "torch.distributed.fsdp.fully_shard (FSDP2), or use PopRiskAdamW."
            )
        return
    if any(x.is_partial() for x in layout.placements):
        raise ValueError(
            "PopRiskSOAP needs the numbers of a parameter, but one has the placements "
            f"{layout.placements}, of which each process has a summand; redistribute it."
        )
    if p.device.type not in (layout.mesh.device_type, "meta"):
        raise ValueError(
            f"PopRiskSOAP gathers matrices over the mesh, but a parameter on {p.device.type!r} has "
            f"one of {layout.mesh.device_type!r} (offloaded?); leave it there, or use PopRiskAdamW."
        )
    if group["factors"] == "examples" or (group["gate"] and group["variance"] == "exact"):
        raise ValueError(
            "PopRiskSOAP sees no single examples where a parameter is sharded (DTensor), but got "
            f"factors={group['factors']!r}, variance={group['variance']!r}; use "
            'factors="gradient" with variance="ema" or "second-moment".'
        )
