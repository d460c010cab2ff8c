"""Which classes and modules memorize planted labels: parts that add up to the whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poprisk.audit import Auditor
from poprisk_lab.audit import memorized
from poprisk_lab.audit.memorized import ModuleShares, by_class
from poprisk_lab.audit.training import TargetScale

N = 400


def planted(kind: str, classes: int = 3) -> tuple[Auditor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 5, generator=g, dtype=torch.float64)
    y = x[:, 0] if kind == "regression" else torch.arange(N) % classes
    return Auditor(y.clone(), kind=kind, plant=0.2), x


def watched(auditor: Auditor, x: Tensor, width: int) -> tuple[ModuleShares, nn.Sequential]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, width)).double()
    kind = auditor.items.kind
    training: Any = SimpleNamespace(model=model, inputs=x, scale=TargetScale(kind, 2.0, 3.0))
    return ModuleShares(training, auditor), model


def move(parameters: Any, size: float) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p += size * torch.randn(p.shape, generator=g, dtype=p.dtype)


def values(shares: ModuleShares) -> tuple[list[float], float]:
    found = shares.found()
    assert found is not None
    return [share["value"] for share in found["shares"]], found["change"]


def test_where_memorization_is_quadratic_the_modules_add_up_exactly() -> None:
    auditor, x = planted("regression")
    shares, model = watched(auditor, x, 1)
    shares.note()
    for _ in range(3):
        move(model.parameters(), 0.5)
        shares.note()
    parts, change = values(shares)
    assert sum(parts) == pytest.approx(change, rel=1e-6)
    assert abs(change) > 0.1
    assert min(map(abs, parts)) > 0.01


@pytest.mark.parametrize("classes", [2, 3])
def test_small_steps_add_up_for_classes(classes: int) -> None:
    auditor, x = planted("classes", classes)
    shares, model = watched(auditor, x, classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    assert auditor.planted is not None
    index = auditor.planted.index
    shares.note()
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), auditor.targets[index]).backward()
        optimizer.step()
        shares.note()
    parts, change = values(shares)
    assert change > 0.005
    assert sum(parts) == pytest.approx(change, rel=0.03)


@pytest.mark.parametrize("moved", [0, 1])
def test_a_module_that_stays_adds_nothing(moved: int) -> None:
    auditor, x = planted("classes")
    shares, model = watched(auditor, x, 3)
    shares.note()
    move(model[moved].parameters(), 0.05)
    shares.note()
    parts, change = values(shares)
    assert parts[1 - moved] == 0
    assert parts[moved] == pytest.approx(change, rel=0.05)


def test_the_change_is_that_of_the_auditors_memorization() -> None:
    auditor, x = planted("classes")
    shares, model = watched(auditor, x, 3)

    def memorization() -> float:
        assert auditor.planted is not None
        p = model(x).detach().softmax(1)
        return auditor.planted.memorization(p, torch.ones(N, dtype=torch.bool)).value

    before = memorization()
    shares.note()
    move(model.parameters(), 1.0)
    shares.note()
    assert values(shares)[1] == pytest.approx(memorization() - before, rel=1e-5)


@pytest.mark.parametrize(("name", "value"), [("FEWEST", 1000), ("MOST_PARAMETERS", 10)])
def test_too_few_labels_or_too_large_a_network_say_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    monkeypatch.setattr(memorized, name, value)
    auditor, x = planted("classes")
    shares, _ = watched(auditor, x, 3)
    shares.note()
    assert shares.found() is None


def test_what_a_checkpoint_held_goes_to_the_device_of_the_network() -> None:
    auditor, x = planted("classes")
    shares, _ = watched(auditor, x, 3)
    shares.note()
    state = shares.state_dict()
    other, _ = watched(auditor, x, 3)
    other.training.model.to("meta")  # any device that checkpoints are not read to
    other.load_state_dict(state)
    assert {w.device.type for w in other.weights} == {"meta"}
    kept = [g for of in other.gradients for g in of if g is not None]
    assert {g.device.type for g in kept} == {"meta"}


@pytest.mark.parametrize("classes", [2, 3])
def test_some_items_are_judged_as_among_all(classes: int) -> None:
    auditor, _ = planted("classes", classes)
    whole = auditor.planted
    assert whole is not None
    g = torch.Generator().manual_seed(0)
    p = torch.randn(N, classes, generator=g).softmax(1)
    order = torch.randperm(N, generator=g)
    seen = torch.ones(N, dtype=torch.bool)
    part = whole.among(order)
    assert torch.equal(order[part.index], whole.index)
    torch.testing.assert_close(part.repeated(p[order], seen), whole.repeated(p, seen))
    half = order[: N // 2]
    some = torch.zeros(N, dtype=torch.bool).index_fill(0, half, value=True)
    torch.testing.assert_close(
        whole.among(half).repeated(p[half], seen[: N // 2]),
        whole.repeated(p, some)[some[whole.index]],
    )


def test_classes_add_up_to_the_whole() -> None:
    auditor, _ = planted("classes")
    torch.manual_seed(0)
    outputs = torch.randn(N, 3) + 2 * torch.eye(3)[auditor.targets]
    auditor.update(torch.arange(N), outputs, auditor.targets)
    result = auditor.result()
    found = by_class(auditor, result)
    assert auditor.planted is not None
    kept = auditor.planted.original[auditor.planted.changed]
    counts = torch.bincount(kept, minlength=3).tolist()
    assert min(counts) >= memorized.FEWEST_OF_CLASS
    assert result.memorization is not None
    mean = sum(counts[k] * found[k].value for k in range(3)) / sum(counts)
    assert mean == pytest.approx(result.memorization.value)
    assert len({round(rate.value, 6) for rate in found.values()}) == 3


def test_nothing_is_said_of_a_class_with_few_planted_labels() -> None:
    targets = torch.arange(N) % 2
    targets[:9] = 2
    auditor = Auditor(targets, plant=0.2)
    auditor.update(torch.arange(N), torch.zeros(N, 3), auditor.targets)
    assert set(by_class(auditor, auditor.result())) == {0, 1}
