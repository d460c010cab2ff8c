"""Compile the native kernel at first use, once per machine, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernel.cpp")
HEADER = Path(__file__).with_name("wrapped.hpp")
BASE_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
"""Tried in this order: not every compiler has both."""
X86 = ("x86_64", "AMD64", "i386", "i686")


class BuildError(RuntimeError):
    """There is no compiler, or it failed."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, after one RuntimeWarning, where it cannot be had."""
    try:
        return load()
    except BuildError as error:
        tell_fallback(str(error))
        return None


@functools.cache
def library_if_any() -> ctypes.CDLL | None:
    """The compiled kernel; None, without a word, where it cannot be had."""
    try:
        return load()
    except BuildError:
        return None


def tell_fallback(reason: str) -> None:
    """Warn that there is no kernel."""
    warnings.warn(
        f"fused=True falls back to foreach=True, which gives the same results more slowly: "
        f"{reason}",
        RuntimeWarning,
        stacklevel=3,
    )


def load() -> ctypes.CDLL:
    """Load the kernel from the cache, compiling it first if needed.

    Raises:
        BuildError: naming what is missing or what the compiler said.
    """
    compiler = find_compiler()
    name = f"kernel-{_fingerprint(compiler)}.so"
    try:
        return _loaded(compiler, cache_directory() / name)
    except OSError:  # no place to keep it, or none from which code may run
        pass
    # A name that nobody can guess, and so prepare; a library that is loaded needs its file no more.
    with tempfile.TemporaryDirectory(prefix="poprisk-", ignore_cleanup_errors=True) as folder:
        try:
            return _loaded(compiler, Path(folder) / name)
        except OSError as error:
            raise BuildError(f"the compiled kernel cannot be stored or loaded: {error}") from error


def _loaded(compiler: str, path: Path) -> ctypes.CDLL:
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _compile(compiler, path)
    return _declared(ctypes.CDLL(str(path)))


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``POPRISK_CACHE``, or a folder of the user's cache."""
    chosen = os.environ.get("POPRISK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "poprisk"


def find_compiler() -> str:
    """The C++ compiler: ``CXX`` if set, else the first of c++, g++ and clang++ on the path."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C++ compiler found ({named or 'c++, g++ or clang++'}); set CXX to one.")


def rounding_flags() -> tuple[str, ...]:
    """What makes the kernel round as torch does here, so that both give the same numbers.

    Torch multiplies and adds in one rounding where it uses the vector instructions for that, which
    on x86 is every capability but the plainest (of old processors, or ATEN_CPU_CAPABILITY=default).
    """
    plain = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX")
    return ("-DPOPRISK_TWO_ROUNDINGS",) if plain and platform.machine() in X86 else ()


def _fingerprint(compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    parts = [
        *(file.read_text(encoding="utf-8") for file in (SOURCE, HEADER)),
        repr((BASE_FLAGS, OPTIONAL_FLAGS, rounding_flags())),
    ]
    parts += [compiler, version.stdout, platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Model and instruction sets: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, path: Path) -> None:
    """Compile to a temporary name and move it: processes that start together do not collide."""
    failure = ""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder) / path.name
        for extra in OPTIONAL_FLAGS:
            command = [
                compiler,
                *BASE_FLAGS,
                *rounding_flags(),
                *extra,
                str(SOURCE),
                "-o",
                str(output),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.replace(output, path)
                return
            failure = f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}"
    raise BuildError(failure)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Say what the functions take and return; arrays are passed by address."""
    address, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.poprisk_update.argtypes = [address]
    library.poprisk_update.restype = None
    library.poprisk_within.argtypes = [address, address, int64, int32, ctypes.c_uint64, int32]
    library.poprisk_within.restype = int32
    library.poprisk_observe.argtypes = [address, address]
    library.poprisk_keep.argtypes = [address, address, ctypes.c_double, int32]
    for function in (library.poprisk_observe, library.poprisk_keep):
        function.restype = None
    library.poprisk_task_size.restype = int64
    return library
