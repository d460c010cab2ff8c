"""Every refusal of the gate and the optimizers names the argument, the value and the way out.

Messages about the data of a task are reached by the tests of tasks.
"""

import math
from typing import Any

import pytest
import torch

from asserts import nothing_changes
from poprisk import PopRiskAdamW
from poprisk._validate import check_number
from poprisk.optim.gate import soft
from poprisk.optim.state import check_state_shapes
from samplers import parameter, take_steps

BAD_VALUES: dict[str, list[Any]] = {
    "lr": [-1e-3, math.nan, math.inf],
    "eps": [-1e-8, math.nan, math.inf],
    "weight_decay": [-0.1, math.nan, math.inf],
    "rho": [-0.1, 1.0, math.nan],
    "z": [-1.0, math.nan, math.inf],
    "softness": [-0.1, math.nan, math.inf],
    "q_min": [-0.1, 1.1, math.nan],
    "alpha": [-0.3, math.nan, math.inf],
}
NUMBERS = [(name, value) for name, values in BAD_VALUES.items() for value in values]


def build(**settings: Any) -> PopRiskAdamW:
    return PopRiskAdamW([parameter(2)], **settings)


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_numbers_outside_their_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must lie in .*, but got {value}"):
        build(**{name: value})


@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.parametrize("value", [None, True, 1j, torch.ones(2)], ids=repr)
def test_numbers_of_another_type(name: str, value: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"^{name} must be a number, but got .*{type(value).__name__}"
    ):
        build(**{name: value})


@pytest.mark.parametrize(
    ("bounds", "interval"),
    [
        ({"low": 0.0, "high": 1.0}, r"\[0.0, 1.0\]"),
        ({"low": 0.0, "high": 1.0, "include_high": False}, r"\[0.0, 1.0\)"),
        ({"low": 0.0, "include_low": False}, r"\(0.0, inf\)"),
        ({"high": 1.0}, r"\(-inf, 1.0\]"),
    ],
)
def test_the_interval_is_shown(bounds: dict[str, Any], interval: str) -> None:
    value = 2.0 if "high" in bounds else -2.0
    with pytest.raises(ValueError, match=f"^x must lie in {interval}, but got {value}.$"):
        check_number("x", value, **bounds)


def test_bounds_are_included_or_not() -> None:
    assert check_number("x", 0, low=0.0, high=1.0) == 0.0
    assert check_number("x", torch.tensor(1.0), low=0.0, high=1.0) == 1.0
    for value, sides in ((0.0, {"include_low": False}), (1.0, {"include_high": False})):
        with pytest.raises(ValueError, match="x must lie in"):
            check_number("x", value, low=0.0, high=1.0, **sides)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mask", "'hard', 'soft', 'snr'"),
        ("mode", "'auto', 'paper'"),
        ("variance", "'ema', 'exact', 'microbatch', 'data-parallel', 'second-moment'"),
        ("reduction", "'per_tensor'"),
        ("alpha", "'auto', 'fresh', 'finite'"),
    ],
)
def test_unknown_names_list_the_known_ones(name: str, options: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be one of {options}, but got 'other'"):
        build(**{name: "other"})


@pytest.mark.parametrize("name", ["mask", "mode", "variance"])
def test_names_must_be_strings(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be one of .*, but got 3"):
        build(**{name: 3})


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), None, "ab"])
def test_betas_are_a_pair(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"betas (must be a pair|\[0\])"):
        build(betas=betas)


@pytest.mark.parametrize(
    ("betas", "which"),
    [((1.0, 0.9), 0), ((-0.1, 0.9), 0), ((0.9, 1.0), 1), ((0.9, math.nan), 1)],
)
def test_betas_lie_below_one(betas: tuple[float, float], which: int) -> None:
    with pytest.raises(ValueError, match=rf"^betas\[{which}\] must lie in \[0.0, 1.0\), but got"):
        build(betas=betas)


@pytest.mark.parametrize(
    ("batch", "dataset", "error", "message"),
    [
        (2.5, None, TypeError, r"^batch_size must be an integer or None, but got 2.5 \(float\)"),
        (True, None, TypeError, "^batch_size must be an integer or None, but got True"),
        (2, "ten", TypeError, "^dataset_size must be an integer or None, but got 'ten'"),
        (0, None, ValueError, "^batch_size must be positive, but got 0"),
        (2, -3, ValueError, "^dataset_size must be positive, but got -3"),
        (None, 10, ValueError, "^dataset_size=10 was given without batch_size; pass the number"),
        (10, 10, ValueError, "batch_size=10 must be smaller than dataset_size=10.*full batch"),
        (11, 10, ValueError, "batch_size=11 must be smaller.*dataset_size=None"),
    ],
)
def test_batch_and_data_set_sizes(
    batch: Any, dataset: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(batch_size=batch, dataset_size=dataset)


def test_the_finite_threshold_needs_the_sizes() -> None:
    with pytest.raises(ValueError, match=r'^alpha="finite" .* needs batch_size and dataset_size'):
        build(alpha="finite", batch_size=3)


def test_second_moment_needs_momentum() -> None:
    with pytest.raises(ValueError, match=r'^variance="second-moment".*betas\[0\] > 0.*"ema"'):
        build(variance="second-moment", betas=(0.0, 0.9))


def test_fused_is_one_path_and_takes_masks_by_name() -> None:
    with pytest.raises(ValueError, match=r"^fused=True and foreach=True were both given"):
        build(fused=True, foreach=True)
    with pytest.raises(TypeError, match=r"^fused=True needs a mask by name.*foreach=True\.$"):
        build(fused=True, mask=soft)
    build(fused=True, foreach=False)


def test_settings_of_a_group_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"^z must lie in"):
        PopRiskAdamW([{"params": [parameter(2)], "z": -1.0}])


@pytest.mark.parametrize("steps", [0, 3])
def test_sparse_gradients_are_refused_before_anything_changes(steps: int) -> None:
    dense, embedding = parameter(3), torch.nn.Embedding(5, 2, sparse=True)
    opt = PopRiskAdamW([dense, embedding.weight])
    take_steps(opt, [[torch.ones_like(p) for p in (dense, embedding.weight)]] * steps)
    opt.zero_grad()
    (embedding(torch.tensor([1])).sum() + dense.sum()).backward()
    with nothing_changes(opt), pytest.raises(RuntimeError, match=r"sparse.*sparse=False"):
        opt.step()


def test_state_shapes() -> None:
    state = {"exp_avg": torch.zeros(2), "step": torch.tensor(1.0)}
    check_state_shapes(0, torch.zeros(2), state, ("exp_avg", "exp_avg_sq"))
    message = r"'exp_avg' of parameter 7 has shape \(2,\), .* shape \(3,\).*same order"
    with pytest.raises(ValueError, match=message):
        check_state_shapes(7, torch.zeros(3), state, ("exp_avg",))
