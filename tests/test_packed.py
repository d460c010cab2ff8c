"""Rows of examples that data moves, as of packed documents: where they lie is found every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poprisk import PopRiskAdamW
from poprisk.per_sample import capture, graph
from reference import factors as reference
from samplers import randn

LENGTHS = [[3, 3, 3]] * (graph.TRUSTED + 1) + [[2, 4, 3], [5, 1, 3], [3, 3, 3]]
ROWS, LONGEST = 9, 7


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    graph._REMEMBERED.clear()
    yield
    graph._REMEMBERED.clear()


def documents(lengths: list[int]) -> Tensor:
    """Of each row, which document it belongs to."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def members(lengths: list[int]) -> Tensor:
    """A row for each document, ones at its positions."""
    return F.one_hot(documents(lengths)).T.double()


def places(lengths: list[int]) -> Tensor:
    """Where each row goes in a flat table of padded documents."""
    return torch.cat([LONGEST * i + torch.arange(n) for i, n in enumerate(lengths)])


def read_back(z: Tensor, lengths: list[int]) -> Tensor:
    """Documents read from the rows, with zeros behind the last row for padding."""
    table = torch.full((3 * LONGEST,), ROWS)
    table[places(lengths)] = torch.arange(ROWS)
    return torch.cat([z, z.new_zeros(1)])[table].view(3, LONGEST).sum(1)


def gathered(z: Tensor, lengths: list[int]) -> Tensor:
    """The same with gather, whose index leads to neighbours."""
    table = torch.full((3 * LONGEST,), ROWS)
    table[places(lengths)] = torch.arange(ROWS)
    return torch.cat([z, z.new_zeros(1)]).gather(0, table).view(3, LONGEST).sum(1)


PUT_TOGETHER: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "index_add": lambda z, n: z.new_zeros(3).index_add(0, documents(n), z),
    "scatter_add": lambda z, n: z.new_zeros(3).scatter_add(0, documents(n), z),
    "scatter_reduce": lambda z, n: z.new_zeros(3).scatter_reduce(0, documents(n), z, "sum"),
    "scatter_add, counted from the end": lambda z, n: (
        z.new_zeros(3, 2)
        .scatter_add(-2, documents(n)[:, None].expand(ROWS, 2), torch.stack([z, z], 1))
        .mean(1)
    ),
    "index_put": lambda z, n: z.new_zeros(3).index_put((documents(n),), z, accumulate=True),
    "padded": lambda z, n: (
        z.new_zeros(3 * LONGEST).index_put((places(n),), z).view(3, LONGEST).sum(1)
    ),
    "index": read_back,
    "gather": gathered,
    "members @ z": lambda z, n: members(n) @ z,
    "z @ members": lambda z, n: (z[None] @ members(n).T)[0],
    "members @ a column": lambda z, n: (members(n) @ z[:, None])[:, 0],
    "einsum": lambda z, n: torch.einsum("dt,t->d", members(n), z),
    "sparse": lambda z, n: torch.sparse.mm(members(n).to_sparse(), z[:, None])[:, 0],
    "mask": lambda z, n: (members(n) * z).sum(1),
    "expanded": lambda z, n: (z.expand(3, ROWS) * members(n)).sum(1),
    "where": lambda z, n: torch.where(members(n) > 0, z, 0.0).sum(1),
    "masked_fill": lambda z, n: z.expand(3, ROWS).masked_fill(members(n) == 0, 0.0).sum(1),
    "repeated": lambda z, n: (z.repeat(3, 1) * members(n)).sum(1),
    "subtracted": lambda z, n: torch.relu(z - 1e6 * (1 - members(n))).sum(1),
    "added": lambda z, n: torch.relu(torch.add(-1e6 * (1 - members(n)), z)).sum(1),
    "minimum": lambda z, n: torch.minimum(z, 1e6 * members(n)).sum(1),
    "addcmul": lambda z, n: torch.zeros(3, ROWS).double().addcmul(z, members(n)).sum(1),
    "a power": lambda z, n: (z[None] ** members(n) - (1 - members(n))).sum(1),
    "masked_select": lambda z, n: torch.stack(
        [z.masked_select(row > 0).sum() for row in members(n)]
    ),
    "segments": lambda z, n: torch.segment_reduce(z, "sum", lengths=torch.tensor(n)),
    "cut": lambda z, n: torch.stack([part.sum() for part in z.split(n)]),
}


def assert_exact(values: Tensor, params: Mapping[str, Tensor]) -> None:
    """Inner products of the gradients are those of the naive Jacobian."""
    jacobian = reference.jacobian(values, params)
    expected = reference.gram(jacobian, jacobian)
    torch.testing.assert_close(capture(values, params).gram(), expected)


@pytest.mark.filterwarnings("ignore:no factored form")
@pytest.mark.parametrize("how", PUT_TOGETHER)
def test_documents_are_told_apart_in_every_batch(how: str) -> None:
    """The first batches hold documents of one length, as if each had its own rows for good."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    params = dict(model.named_parameters())
    for i, lengths in enumerate(LENGTHS):
        rows = model(randn(ROWS, 4, seed=i))[:, 0].square()
        values = PUT_TOGETHER[how](rows, lengths)
        torch.testing.assert_close(values, members(lengths) @ rows)
        assert_exact(values, params)


@pytest.mark.filterwarnings("ignore:no factored form")
def test_packed_sequences_are_told_apart_in_every_batch() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 3).double()
    params = dict(model.named_parameters())
    for i in range(graph.TRUSTED + 3):
        lengths = torch.tensor([3, 3, 3] if i <= graph.TRUSTED else [5, 3, 1])
        packed = nn.utils.rnn.pack_padded_sequence(randn(3, 5, 2, seed=i), lengths, True)
        packed = packed._replace(data=model(packed.data).square().sum(1, keepdim=True))
        values = nn.utils.rnn.pad_packed_sequence(packed, True)[0].sum((1, 2))
        assert_exact(values, params)


@pytest.mark.filterwarnings("ignore:no factored form")
def test_the_variance_of_packed_documents_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    opt = PopRiskAdamW(model, variance="exact", lr=0.0, rho=0.0, betas=(0.0, 0.9))
    for i, lengths in enumerate(LENGTHS):
        rows = model(randn(ROWS, 4, seed=i))[:, 0].square()
        losses = rows.new_zeros(3).index_add(0, documents(lengths), rows)
        rows_of = reference.jacobian(losses, {"weight": model.weight})["weight"]
        opt.zero_grad()
        opt.backward(losses)
        opt.step()
        found = opt.state[model.weight]["grad_mean_var"].flatten()
        torch.testing.assert_close(found, rows_of.reshape(3, -1).var(0) / 3)


HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "a label's place": lambda z: z.gather(1, torch.tensor([[0], [3], [1]]))[:, 0],
    "the last position": lambda z: z[torch.arange(3), torch.tensor([3, 0, 2])],
    "a reordered class": lambda z: z[:, torch.tensor([2, 0, 1, 3])].square().sum(1),
    "a frozen layer": lambda z: (z @ torch.ones(4, 2).double()).sum(1),
    "a stack of fixed products": lambda z: (torch.ones(3, 2, 4).double() @ z[..., None]).sum(
        (1, 2)
    ),
    "a mask of each example": lambda z: (z * torch.eye(3, 4)).sum(1),
    "a class's weight": lambda z: (z * torch.arange(4.0)).sum(1),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_leaves_the_examples_in_place_is_known_after_some_batches(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4).double()
    params = dict(model.named_parameters())
    for i in range(graph.TRUSTED):
        capture(HARMLESS[what](model(randn(3, 4, seed=i))), params)
    monkeypatch.setattr(graph, "_find_layouts", None)
    capture(HARMLESS[what](model(randn(3, 4))), params)
