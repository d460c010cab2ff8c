"""Every test starts as in a new process, whatever ran before it and in whatever order."""

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from poprisk.per_sample import nodes

THREADS = int(os.environ.get("POPRISK_TEST_THREADS", "1"))

torch.set_num_threads(THREADS)
settings.register_profile("poprisk", deadline=None, derandomize=True, database=None)
settings.load_profile("poprisk")

NUMERICS = {
    f"test_{name}.py"
    for name in (
        "channel claim_image drift evaluation factors follow fused fuzz gate gated integrals "
        "kernel monitor optimizer optimizer_state path quadrature recorder risk_canaries "
        "risk_choose risk_estimate risk_fresh risk_gap risk_links risk_loo risk_tangent risk_twin "
        "rules tasks_fields training variance within"
    ).split()
}
"""Files whose numbers depend on the processor: what `make test-portable` runs again."""
MIXED = {"test_proofs.py"}
"""Files some of whose tests are marked one by one."""


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-randomly shuffle only: seeds are set below, the same in each run."""
    config.option.randomly_reset_seed = False
    if not torch.accelerator.is_available():
        seed_the_processor_alone(config)


def seed_the_processor_alone(config: pytest.Config) -> None:
    """Where there are no other devices, seed none.

    For each that may come up later, torch keeps the whole stack of Python with each seed: a
    millisecond below pytest, and a third of the time of what seeds at every step.
    """
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)

    def no_device(seed: int) -> None: ...

    for device in (torch.cuda, torch.xpu, torch.mtia):
        patch.setattr(device, "manual_seed_all", no_device)


def pytest_collection_finish() -> None:
    """Let the collector look rarely at what stays for good: torch, the tests, their parameters.

    Old versions of hypothesis look up references by it, which ``gc.freeze`` would hide.
    """
    gc.collect()
    gc.set_threshold(50_000, 20, 100)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A run of the tests of numbers reads no other file: that would take half of its time."""
    only_numbers = config.option.markexpr.startswith("numerics")
    others = (
        collection_path.name.startswith("test_") and collection_path.name not in NUMERICS | MIXED
    )
    return True if only_numbers and others else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of numbers."""
    for item in items:
        if Path(item.path).name in NUMERICS:
            item.add_marker("numerics")


def shared_state() -> dict[str, Any]:
    """What a test must leave as it was, for those after it."""
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "working directory": Path.cwd(),
    }


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> Iterator[None]:
    """Known random numbers, nothing said yet; nothing left behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    nodes._SAID.clear()
    before = shared_state()
    yield
    assert shared_state() == before
