"""A loss of several terms with sizes of their own: the equations, what they reduce to, misuse."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from asserts import assert_bitwise
from cases import MASKS, settings
from poprisk import PopRiskAdamW, PopRiskSOAP, gated
from poprisk.optim.sizes import TERM_KEYS, charges_by_term
from poprisk_lab.controls import ShuffledMask
from reference.optimizer import ReferenceTerms

BATCH = {"data": 8, "border": 4, "inside": 8}
WHOLE = {"data": 24, "border": 40, "inside": None}
SIZES: dict[str, Any] = {"batch_size": BATCH, "dataset_size": WHOLE}
SHAPE = (3, 4)


def gradients(
    seed: int, steps: int, *, names: Mapping[str, Any] = BATCH
) -> list[dict[str, Tensor]]:
    """Gradients of each term, of means and noise that differ from coordinate to coordinate."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(SHAPE, generator=generator, dtype=torch.float64)

    means, sizes = ({k: draw() for k in names} for _ in range(2))
    return [{k: means[k] + sizes[k] * draw() for k in names} for _ in range(steps)]


def weights(dtype: torch.dtype = torch.float64) -> Parameter:
    generator = torch.Generator().manual_seed(7)
    return Parameter(torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype))


def grad_of(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def tell(optimizer: PopRiskAdamW, w: Tensor, grads: Mapping[str, Tensor]) -> None:
    """A backward pass of each term, whose gradients are these."""
    optimizer.zero_grad()
    for name, grad in grads.items():
        with optimizer.term(name):
            (w * grad.to(w.dtype)).sum().backward()


def run(w: Parameter, steps: list[dict[str, Tensor]], **changes: Any) -> list[Tensor]:
    """The weights after each step."""
    optimizer = PopRiskAdamW([w], **{**settings(**SIZES), **changes})
    found = []
    for grads in steps:
        tell(optimizer, w, grads)
        optimizer.step()
        found.append(w.detach().clone())
    return found


# --- the equations --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", ["auto", "paper"])
@pytest.mark.parametrize("reduction", [None, "per_tensor"])
def test_equals_the_reference(mask: str, mode: str, reduction: str | None) -> None:
    changes: dict[str, Any] = {"mask": mask, "mode": mode, "reduction": reduction, "z": 0.7}
    assert_equals_reference(**changes)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": "finite", "batch_size": {"data": 8, "border": 4, "inside": 8},
         "dataset_size": {"data": 24, "border": 40, "inside": 90}},
        {"alpha": "finite", "mode": "paper", "batch_size": {"data": 8, "border": 4, "inside": 8},
         "dataset_size": {"data": 24, "border": 40, "inside": 90}},
        {"maximize": True, "z": 0.5},
        {"q_min": 0.2, "betas": (0.5, 0.99), "rho": 0.8},
        {"weight_decay": 0.0, "eps": 1e-3},
    ],
)  # fmt: skip
def test_equals_the_reference_with_other_settings(changes: dict[str, Any], foreach: bool) -> None:
    assert_equals_reference(foreach=foreach, **changes)


def assert_equals_reference(**changes: Any) -> None:
    steps = gradients(3, 40)
    given = {**settings(**SIZES), **changes}
    reference = ReferenceTerms(weights(), **given)
    found = run(weights(), steps, **changes)
    gates = 0
    for w, grads in zip(found, steps, strict=True):
        torch.testing.assert_close(w, reference.step_terms(grads), rtol=1e-9, atol=1e-12)
        gates += not torch.equal(w, found[0])
    assert gates


def test_what_is_charged_is_the_sum_of_the_variances_each_by_its_ratio() -> None:
    """The state holds Var h, whose expectation is that sum times 1 + r."""
    torch.manual_seed(0)
    n, sigma = 20_000, {"data": 1.0, "border": 3.0, "inside": 5.0}
    w = Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = PopRiskAdamW([w], lr=0.0, **SIZES)
    for _ in range(150):
        grads = {k: 4 + s * torch.randn(n, dtype=torch.float64) for k, s in sigma.items()}
        tell(optimizer, w, grads)
        optimizer.step()
    r, scale = 0.1 / 1.9, 1 / (1 - 0.99**149)
    expected = (1 + r) * (8 / 16 * 1.0 + 4 / 36 * 9.0)
    found = scale * float(optimizer.state[w]["term_var"].mean())
    assert found == pytest.approx(expected, rel=0.03)
    whole = scale * float(optimizer.state[w]["grad_mean_var"].mean())
    assert whole == pytest.approx((1 + r) * 35.0, rel=0.03)


def test_pure_noise_of_a_repeated_term_passes_as_rarely_as_with_it_alone() -> None:
    """Fresh noise that averages out costs little, repeated noise what its data set is small."""

    def passed(repeated: float, fresh: float) -> float:
        torch.manual_seed(1)
        w = Parameter(torch.zeros(4000, dtype=torch.float64))
        sizes = {"batch_size": {"a": 8, "b": 8}, "dataset_size": {"a": 24, "b": None}}
        optimizer = PopRiskAdamW([w], lr=0.0, mask="hard", z=2.0, **sizes)
        always = repeated * 0.5**0.5 * torch.randn(4000, dtype=torch.float64)  # the sample's error
        for _ in range(100):
            noise = [torch.randn(4000, dtype=torch.float64) for _ in range(2)]
            tell(optimizer, w, {"a": always + repeated * noise[0], "b": fresh * noise[1]})
            optimizer.step()
        return optimizer.gate_stats()["groups[0]"].pass_rate

    for repeated, fresh in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 5.0)):
        assert passed(repeated, fresh) == pytest.approx(0.0455, abs=0.02)


def test_no_coordinate_pays_less_or_more_than_the_terms_do() -> None:
    w = weights()
    optimizer = PopRiskAdamW([w], **settings(**SIZES))
    seen = list[Tensor]()

    def mask(mean_sq: Any, var: Any, *, alpha: Any, **rest: Any) -> Any:
        seen.extend(alpha)
        return mean_sq

    from poprisk.optim import gate

    before = gate.MASKS_["soft"]
    gate.MASKS_["soft"] = mask
    try:
        for grads in gradients(5, 30):
            tell(optimizer, w, grads)
            optimizer.step()
    finally:
        gate.MASKS_["soft"] = before
    all_alphas = torch.cat([a.flatten() for a in seen[-10:]])
    r = 0.1 / 1.9
    assert float(all_alphas.min()) >= 0.9 * 1.5**2 * r / (1 + r)
    assert float(all_alphas.max()) <= 1.2 * 1.5**2 * (r + 0.5) / (1 + r)


# --- what it reduces to ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "paper"])
@pytest.mark.parametrize("names", [("data",), ("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("whole", [24, None])
def test_terms_of_the_same_sizes_are_one_loss_bit_for_bit(
    names: tuple[str, ...], whole: int | None, mode: str
) -> None:
    steps = gradients(11, 30, names=dict.fromkeys(names))
    sizes = {"batch_size": dict.fromkeys(names, 8), "dataset_size": dict.fromkeys(names, whole)}
    w, plain = weights(torch.float32), weights(torch.float32)
    found = run(w, steps, **sizes, mode=mode)
    one = PopRiskAdamW([plain], **settings(batch_size=8, dataset_size=whole, mode=mode))
    for grads, after in zip(steps, found, strict=True):
        one.zero_grad()
        for grad in grads.values():
            (plain * grad.float()).sum().backward()
        one.step()
        assert torch.equal(plain, after)


def test_the_gradients_are_those_of_plain_backward_passes_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    plain = copy.deepcopy(model)
    optimizer = PopRiskAdamW(model, **SIZES)
    x = torch.randn(6, 3)
    for name, scale in zip(BATCH, (1.0, 3.0, 0.2), strict=True):
        with optimizer.term(name):
            model(scale * x).square().mean().backward()
        plain(scale * x).square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_bitwise([grad_of(p)], [grad_of(q)])


@pytest.mark.parametrize("alpha", ["fresh", 0.3])
def test_a_threshold_without_sizes_is_not_changed_by_them(alpha: Any) -> None:
    steps = gradients(2, 20)
    w, plain = weights(), weights()
    one = PopRiskAdamW([plain], **settings(alpha=alpha))
    for grads, after in zip(steps, run(w, steps, alpha=alpha), strict=True):
        one.zero_grad()
        (plain * sum(grads.values())).sum().backward()
        one.step()
        torch.testing.assert_close(plain.detach(), after, rtol=1e-12, atol=0)


def test_a_group_without_a_gate_is_adamw_and_needs_no_terms() -> None:
    w, plain = weights(), weights()
    optimizer = PopRiskAdamW([{"params": [w], "gate": False}], lr=0.1, **SIZES)
    adamw = torch.optim.AdamW([plain], lr=0.1)
    for grads in gradients(4, 5):
        for p, o in ((w, optimizer), (plain, adamw)):
            p.grad = sum(grads.values(), torch.zeros(SHAPE, dtype=torch.float64))
            o.step()
    assert torch.equal(w, plain)
    assert "term_var" not in optimizer.state[w]


def test_charges() -> None:
    base = {**SIZES, "alpha": "auto", "mode": "auto", "gate": True}
    assert charges_by_term(base) == {"data": 0.5, "border": 4 / 36, "inside": 0.0}
    assert charges_by_term({**base, "mode": "paper"})["inside"] == 1.0
    alike = {"batch_size": {"a": 32, "b": 16}, "dataset_size": {"a": 100, "b": 50}}
    assert charges_by_term({**base, **alike}) == {}
    assert charges_by_term({**base, "gate": False}) == {}


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_dtypes_follow_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    start = torch.randn(50, generator=generator, dtype=wide).to(dtype)
    steps = [
        {k: (0.3 + torch.randn(50, generator=generator, dtype=wide)).to(dtype) for k in BATCH}
        for _ in range(25)
    ]

    def end(kind: torch.dtype) -> Tensor:
        w = Parameter(start.to(kind, copy=True))
        optimizer = PopRiskAdamW([w], lr=0.05, **SIZES)
        for grads in steps:
            optimizer.zero_grad()
            for name, grad in grads.items():
                with optimizer.term(name):
                    (w * grad.to(kind).conj()).sum().real.backward()
            optimizer.step()
        return w.detach()

    far = 0.05 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(end(dtype).to(wide), end(wide), rtol=far, atol=far)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_factor_on_the_sum_counts_for_the_terms(factor: float) -> None:
    """As clipping by norm, and the unscaling of mixed precision, put on it."""
    steps = gradients(6, 25)
    w, scaled = weights(), weights()
    one, other = (PopRiskAdamW([p], **settings(**SIZES)) for p in (w, scaled))
    for grads in steps:
        tell(one, w, {k: factor * g for k, g in grads.items()})
        tell(other, scaled, grads)
        grad_of(scaled).mul_(factor)
        one.step()
        other.step()
    torch.testing.assert_close(scaled.detach(), w.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_run_that_is_resumed_ends_as_one_in_one_piece(at: int) -> None:
    steps = gradients(8, 20)
    whole = run(weights(), steps)[-1]
    w = weights()
    first = PopRiskAdamW([w], **settings(**SIZES))
    for grads in steps[:at]:
        tell(first, w, grads)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again = Parameter(w.detach().clone())
    second = PopRiskAdamW([again], **settings(**SIZES))
    second.load_state_dict(torch.load(file, weights_only=True))
    for grads in steps[at:]:
        tell(second, again, grads)
        second.step()
    assert torch.equal(again, whole)


def test_the_state_keeps_its_precision_and_shape_when_loaded() -> None:
    w = weights(torch.bfloat16)
    optimizer = PopRiskAdamW([w], **SIZES)
    for grads in gradients(1, 3):
        tell(optimizer, w, grads)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    for key in TERM_KEYS:
        found, expected = optimizer.state[w][key], saved["state"][0][key]
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        bad = copy.deepcopy(saved)
        bad["state"][0][key] = torch.zeros(5)
        with pytest.raises(ValueError, match=f"state '{key}' of parameter 0 has shape"):
            optimizer.load_state_dict(bad)


def test_terms_that_come_in_the_middle_of_a_run_begin_with_an_open_gate() -> None:
    w, steps = weights(), gradients(9, 12)
    optimizer = PopRiskAdamW([w], **settings(batch_size=8, dataset_size=24))
    for grads in steps[:5]:
        w.grad = sum(grads.values(), torch.zeros(SHAPE, dtype=torch.float64))
        optimizer.step()
    optimizer.param_groups[0].update(SIZES)
    for i, grads in enumerate(steps[5:]):
        tell(optimizer, w, grads)
        optimizer.step()
        if i == 0:
            assert optimizer.gate_stats()["groups[0]"].mean_gate == 1.0
            assert not optimizer.state[w]["term_var"].any()
    h = [sum(c**0.5 * g[k] for k, c in zip(BATCH, (0.5, 4 / 36, 0.0), strict=True)) for g in steps]
    mean, var = h[5], torch.zeros(SHAPE, dtype=torch.float64)
    average = 0.1 * h[5]
    for k, x in enumerate(h[6:], start=1):
        mean = average / (1 - 0.9**k)
        var = 0.95 * var + 0.05 * (x - mean) ** 2
        average = 0.9 * average + 0.1 * x
    torch.testing.assert_close(optimizer.state[w]["term_var"], var)


def test_terms_begin_anew_after_the_gate_was_off() -> None:
    """Their average has not been kept meanwhile, and would be old."""
    w, steps = weights(), gradients(9, 12)
    optimizer = PopRiskAdamW([w], **settings(**SIZES))
    for k, grads in enumerate(steps):
        optimizer.param_groups[0]["gate"] = not 4 <= k < 8
        if 4 <= k < 8:
            w.grad = sum(grads.values(), torch.zeros(SHAPE, dtype=torch.float64))
        else:
            tell(optimizer, w, grads)
        optimizer.step()
    other = PopRiskAdamW([weights()], **settings(**SIZES))
    for grads in steps[8:]:
        tell(other, other.param_groups[0]["params"][0], grads)
        other.step()
    (state,) = other.state.values()
    for key in TERM_KEYS:
        torch.testing.assert_close(optimizer.state[w][key], state[key])


def test_a_term_may_take_several_passes_and_be_left_out() -> None:
    w, steps = weights(), gradients(10, 3)
    optimizer = PopRiskAdamW([w], **settings(**SIZES))
    for grads in steps:
        optimizer.zero_grad()
        with optimizer.term("data"):
            (w * grads["data"]).sum().backward()
            (w * grads["border"]).sum().backward()
        with optimizer.term("data"):
            (w * grads["inside"]).sum().backward()
        optimizer.step()
    h = [0.5**0.5 * sum(g.values()) for g in steps]
    average = 0.1 * h[0]
    var = 0.05 * (h[1] - average / 0.1) ** 2
    average = 0.9 * average + 0.1 * h[1]
    var = 0.95 * var + 0.05 * (h[2] - average / 0.19) ** 2
    torch.testing.assert_close(optimizer.state[w]["term_var"], var)


def test_a_closure_computes_the_terms() -> None:
    w, steps = weights(), gradients(12, 10)
    optimizer = PopRiskAdamW([w], **settings(**SIZES))
    for grads in steps:

        def closure(grads: dict[str, Tensor] = grads) -> float:
            tell(optimizer, w, grads)
            return 1.0

        assert optimizer.step(closure) == 1.0
    assert torch.equal(w, run(weights(), steps)[-1])


def test_terms_that_cancel_do_not_hide_what_cannot_be_squared() -> None:
    """Their sum is small, and h is not: it would stay in its average for good."""
    w = weights(torch.float32)
    optimizer = PopRiskAdamW([w], **SIZES)
    steps = gradients(1, 4)
    for grads in steps[:2]:
        tell(optimizer, w, grads)
        optimizer.step()
    before = copy.deepcopy((w.detach(), dict(optimizer.state[w])))
    huge = torch.full(SHAPE, 1e20)
    tell(optimizer, w, {"data": huge, "inside": -huge})
    assert not bool(grad_of(w).any())
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        optimizer.step()
    assert_bitwise((w.detach(), dict(optimizer.state[w])), before)
    tell(optimizer, w, steps[2])
    optimizer.step()
    assert bool(optimizer.state[w]["term_var"].isfinite().all())


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_is_as_ever() -> None:
    steps = gradients(13, 10)
    w = weights()
    optimizer = PopRiskAdamW([w], **settings(**SIZES))
    for i, grads in enumerate(steps):
        if i == 4:
            tell(optimizer, w, {**grads, "border": torch.full(SHAPE, float("nan"))})
            with pytest.warns(RuntimeWarning, match="skipped a step"):
                optimizer.step()
        tell(optimizer, w, grads)
        optimizer.step()
    assert torch.equal(w, run(weights(), steps)[-1])


def test_an_abandoned_step_leaves_nothing_behind() -> None:
    steps = gradients(14, 10)
    clears: list[Callable[[Parameter, Any], None]] = [
        lambda w, o: o.zero_grad(),
        lambda w, o: o.zero_grad(set_to_none=False),
        lambda w, o: setattr(w, "grad", None),
        lambda w, o: torch._foreach_zero_([grad_of(w)]),
    ]
    expected = run(weights(), steps)[-1]
    for clear in clears:
        w = weights()
        optimizer = PopRiskAdamW([w], **settings(**SIZES))
        for grads in steps:
            with optimizer.term("data"):
                (w * 5).sum().backward()
            clear(w, optimizer)
            for name, grad in grads.items():
                with optimizer.term(name):
                    (w * grad).sum().backward()
            optimizer.step()
            clear(w, optimizer)
        assert torch.equal(w, expected)


def test_parameters_that_a_term_does_not_reach() -> None:
    reached, other = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    late = Parameter(torch.ones(4))
    optimizer = PopRiskAdamW([reached, other, late], lr=0.1, **SIZES)
    for i in range(4):
        optimizer.zero_grad()
        with optimizer.term("data"):
            reached.sum().backward()
        with optimizer.term("inside"):
            (other.sum() + (late.sum() if i > 1 else 0)).backward()
        optimizer.step()
    assert not optimizer.state[other]["term_avg"].any()
    assert optimizer.state[reached]["term_avg"].any()
    assert int(optimizer.state[late]["step"]) == 2


# --- misuse ---------------------------------------------------------------------------------------


def unchanged(optimizer: PopRiskAdamW, w: Parameter) -> Iterator[None]:
    """Nothing moves between the two ends."""
    state, before = copy.deepcopy(optimizer.state_dict()["state"]), w.detach().clone()
    yield
    assert torch.equal(w, before)
    now = optimizer.state_dict()["state"]
    assert set(now) == set(state)
    for key in state:
        assert all(torch.equal(torch.as_tensor(now[key][k]), torch.as_tensor(v))
                   for k, v in state[key].items())  # fmt: skip


def outside(w: Parameter, o: PopRiskAdamW) -> None:
    (w * 2).sum().backward()
    o.step()


def beside(w: Parameter, o: PopRiskAdamW) -> None:
    with o.term("data"):
        w.sum().backward()
    (w * torch.arange(12.0).view(SHAPE)).sum().backward()
    o.step()


def between(w: Parameter, o: PopRiskAdamW) -> None:
    with o.term("data"):
        w.sum().backward()
    (w * 2).sum().backward()
    with o.term("inside"):
        w.sum().backward()


def left_over(w: Parameter, o: PopRiskAdamW) -> None:
    with o.term("data"):
        w.sum().backward()
    o.step()
    with o.term("data"):
        w.sum().backward()


def nested(w: Parameter, o: PopRiskAdamW) -> None:
    with o.term("data"), o.term("inside"):
        w.sum().backward()


def step_within(w: Parameter, o: PopRiskAdamW) -> None:
    with o.term("data"):
        w.sum().backward()
        o.step()


def clear_within(w: Parameter, o: PopRiskAdamW) -> None:
    with o.term("data"):
        o.zero_grad()


def hooked(w: Parameter, o: PopRiskAdamW) -> None:

    def hook(p: Tensor) -> None:
        return None

    handle = w.register_post_accumulate_grad_hook(hook)
    try:
        with o.term("data"):
            w.sum().backward()
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (outside, "1 of 1 gradients of this step are not of a term of the loss"),
        (beside, "gradients were changed between the backward pass and step"),
        (between, "gradients were changed between two terms of a step"),
        (nested, r"optimizer\.term\('inside'\) was called within optimizer\.term\('data'\)"),
        (step_within, r"step\(\) was called within optimizer\.term\('data'\)"),
        (clear_within, r"zero_grad\(\) was called within optimizer\.term\('data'\)"),
        (hooked, "a hook by register_post_accumulate_grad_hook"),
    ],
)
def test_misuse_is_refused_before_anything_moves(
    misuse: Callable[[Parameter, PopRiskAdamW], None], message: str
) -> None:
    w = Parameter(torch.ones(SHAPE))
    optimizer = PopRiskAdamW([w], lr=0.1, **SIZES)
    for check in unchanged(optimizer, w):
        with pytest.raises(RuntimeError, match=message):
            misuse(w, optimizer)
        assert check is None
    optimizer.zero_grad()  # and it goes on
    with optimizer.term("data"):
        w.sum().backward()
    optimizer.step()


def test_gradients_of_the_step_before_are_refused() -> None:
    w = Parameter(torch.ones(SHAPE))
    optimizer = PopRiskAdamW([w], lr=0.1, **SIZES)
    with pytest.raises(RuntimeError, match="gradients are left from before"):
        left_over(w, optimizer)


def test_an_error_within_a_term_leaves_the_gradients_of_the_others() -> None:
    w = Parameter(torch.ones(SHAPE))
    optimizer = PopRiskAdamW([w], lr=0.1, **SIZES)
    with optimizer.term("data"):
        w.sum().backward()
    before = grad_of(w)

    def failing() -> None:
        with optimizer.term("inside"):
            w.sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert w.grad is before
    assert torch.equal(before, torch.ones(SHAPE))
    optimizer.step()


def test_names_are_checked() -> None:
    w = Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"must be a term of batch_size \('data', 'border'"):
        PopRiskAdamW([w], **SIZES).term("physics")
    with pytest.raises(RuntimeError, match=r"term\('data'\) is for batch_size and dataset_size by"):
        PopRiskAdamW([w], batch_size=8).term("data")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset_size": 24}, TypeError, "must both be given by term"),
        ({"batch_size": 8}, TypeError, "must both be given by term"),
        ({"batch_size": [8, 8], "dataset_size": [24, None]}, TypeError, "must both be given by t"),
        ({"dataset_size": {"data": 24}}, ValueError, "must both be given by term"),
        ({"batch_size": {}, "dataset_size": {}}, ValueError, "must both be given by term"),
        ({"batch_size": {1: 8}, "dataset_size": {1: 24}}, TypeError, "must be a string"),
        ({"batch_size": {**BATCH, "data": 24}}, ValueError,
         r"batch_size\['data'\]=24 must be smaller than dataset_size\['data'\]=24"),
        ({"batch_size": {**BATCH, "data": None}}, ValueError, r"without batch_size\['data'\]"),
        ({"batch_size": {**BATCH, "data": 8.0}}, TypeError, r"batch_size\['data'\] must be an int"),
        ({"dataset_size": {**WHOLE, "data": 0}}, ValueError, r"dataset_size\['data'\] must be pos"),
        ({"alpha": "finite"}, ValueError, "needs batch_size and dataset_size"),
        ({"variance": "second-moment"}, ValueError, 'which variance="ema" measures alone'),
        ({"variance": "exact"}, ValueError, 'which variance="ema" measures alone'),
        ({"fused": True}, ValueError, "fused=True cannot take terms"),
        ({"capturable": True}, ValueError, "capturable=True cannot take terms"),
        ({"mask": ShuffledMask("soft")}, TypeError, "need a mask by name"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PopRiskAdamW([Parameter(torch.ones(1))], **{**SIZES, **changes})


def test_the_gate_in_a_basis_refuses_terms() -> None:
    with pytest.raises(TypeError, match="PopRiskSOAP takes batch_size and dataset_size as numbers"):
        PopRiskSOAP([weights()], **SIZES)


def test_a_loop_that_cannot_tell_terms_apart_is_told_of_them() -> None:
    assert PopRiskAdamW([weights()], **SIZES).told_by_loop() == "sizes by term"
    assert PopRiskAdamW([weights()], batch_size=8, dataset_size=24).told_by_loop() is None


def test_a_wrapper_refuses_terms() -> None:
    sgd = torch.optim.SGD([Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match="gated\\(\\) takes batch_size as one number"):
        gated(sgd, **SIZES)


def test_sizes_of_numpy_are_saved_as_python_s() -> None:
    numpy = pytest.importorskip("numpy")
    sizes: dict[str, Any] = {
        key: {k: None if v is None else numpy.int64(v) for k, v in by_name.items()}
        for key, by_name in SIZES.items()
    }
    optimizer = PopRiskAdamW([weights()], **sizes)
    saved = optimizer.state_dict()["param_groups"][0]
    kinds = {type(v) for key in SIZES for v in saved[key].values()}
    assert kinds == {int, type(None)}
    assert list(itertools.chain(saved["batch_size"])) == list(BATCH)
