"""Say on what the tests run: a failure elsewhere begins with the processor and torch's choice."""

import os
import platform
from pathlib import Path

import torch


def processor() -> str:
    """The model of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    pairs = (line.partition(":") for line in lines)
    named = {key.strip(): value.strip() for key, _, value in pairs}
    return named.get("model name") or named.get("CPU part") or platform.processor()


if __name__ == "__main__":
    mkl, backends = torch.backends.mkl.is_available(), torch.backends
    print(f"{processor()}, {platform.machine()}, {os.cpu_count()} cores, {platform.platform()}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, MKL: {mkl}")
    print(f"torch uses {backends.cpu.get_cpu_capability()} and {torch.get_num_threads()} threads")
