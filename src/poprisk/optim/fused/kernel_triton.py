"""The gated AdamW update in one pass over a GPU's memory.

The arithmetic is that of ``kernel.cpp``, operation by operation, with the same coefficients by the
same names: where ATen's kernels fuse a multiplication and an addition, ``tl.fma`` does, and nothing
else is contracted (launched with ``enable_fp_fusion=False``); quotients and roots are correctly
rounded. bfloat16 is widened and rounded bit by bit, so that the interpreter does as a GPU does.

Only :mod:`poprisk.optim.fused.launch_triton` imports this module, and it needs Triton.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from poprisk.optim.fused.native import ESTIMATORS, MASKS, PHASES
from poprisk.optim.fused.numbers import COLUMNS

UNOBSERVED, EMA = tl.constexpr(ESTIMATORS["unobserved"]), tl.constexpr(ESTIMATORS["ema"])
SECOND_MOMENT, GIVEN = tl.constexpr(ESTIMATORS["second-moment"]), tl.constexpr(ESTIMATORS["given"])
OPEN, HARD, SOFT = (tl.constexpr(MASKS[name]) for name in ("open", "hard", "soft"))
WHOLE, MOMENTS, WEIGHTS = (tl.constexpr(PHASES[name]) for name in ("whole", "moments", "weights"))


def _column(name: str) -> Any:
    return tl.constexpr(COLUMNS.index(name))


SIGN, CENTRE, RHO_WEIGHT = _column("sign"), _column("centre"), _column("rho_weight")
DECAY, RATE, EPS, V_CORRECTION = map(_column, ("decay", "rate", "eps", "v_correction"))
BETA1_WEIGHT, BETA2, BETA2_WEIGHT = map(_column, ("beta1_weight", "beta2", "beta2_weight"))
V_SCALE, M_SCALE_SQ, ALPHA, WEIGHT = map(_column, ("v_scale", "m_scale_sq", "alpha", "weight"))
MASK_EPS, TINY, Q_MIN, OPENED = map(_column, ("mask_eps", "tiny", "q_min", "opened"))


@triton.jit
def _number(numbers, column: tl.constexpr, real: tl.constexpr):
    return tl.load(numbers + column).to(real)


@triton.jit
def _at_least(x, low):
    return tl.where(x > low, x, low)


@triton.jit
def _lerp(start, end, weight):
    """torch.lerp, which changes its form at a weight of one half."""
    way = end - start
    return tl.where(weight < 0.5, tl.fma(weight, way, start), tl.fma(weight - 1, way, end))


@triton.jit
def _quotient(x, y, real: tl.constexpr):
    """The quotient to the nearest number, as ``/`` of float32 is not."""
    return tl.div_rn(x, y) if real == tl.float32 else x / y


@triton.jit
def _root(x, real: tl.constexpr):
    return tl.sqrt_rn(x) if real == tl.float32 else tl.sqrt(x)


@triton.jit
def _loaded(
    p, rest, kind: tl.constexpr, real: tl.constexpr, full: tl.constexpr, size: tl.constexpr
):
    """The block at p in the precision of the state; zeros beyond the ``rest`` of the tensor."""
    at = p.to(tl.pointer_type(tl.uint16 if kind == tl.bfloat16 else kind)) + tl.arange(0, size)
    x = tl.load(at) if full else tl.load(at, mask=tl.arange(0, size) < rest, other=0)
    if kind == tl.bfloat16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(real)


@triton.jit
def _store(p, x, rest, kind: tl.constexpr, full: tl.constexpr, size: tl.constexpr):
    at = p.to(tl.pointer_type(tl.uint16 if kind == tl.bfloat16 else kind)) + tl.arange(0, size)
    if kind == tl.bfloat16:  # to nearest, ties to even
        bits = x.to(tl.uint32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, near, 0x7FC0).to(tl.uint16)
    else:
        y = x.to(kind)
    if full:
        tl.store(at, y)
    else:
        tl.store(at, y, mask=tl.arange(0, size) < rest)


@triton.jit
def _gate(mean_sq, variance, numbers, mask: tl.constexpr, real: tl.constexpr):
    signal = mean_sq
    if mask == HARD:
        excess = tl.fma(-_number(numbers, ALPHA, real), variance, signal)
        q = tl.where(excess > 0, 1.0, 0.0).to(real)
    else:
        if mask == SOFT:
            signal = _at_least(tl.fma(-_number(numbers, ALPHA, real), variance, signal), 0.0)
        total = tl.fma(_number(numbers, WEIGHT, real), variance, signal)
        total = _at_least(total + _number(numbers, MASK_EPS, real), _number(numbers, TINY, real))
        q = _quotient(signal, total, real)
    q = _at_least(q, _number(numbers, Q_MIN, real))
    return tl.where(_number(numbers, OPENED, real) > 0, 1.0, q)


@triton.jit
def _moments(
    g,
    m,
    v,
    s,
    numbers,
    rest,
    grad_kind: tl.constexpr,
    real: tl.constexpr,
    estimator: tl.constexpr,
    full: tl.constexpr,
    size: tl.constexpr,
):
    """Update m, v and s; return the new m and v, and the raw variance."""
    grad = _number(numbers, SIGN, real) * _loaded(g, rest, grad_kind, real, full, size)
    mean = _loaded(m, rest, real, real, full, size)
    raw = mean
    if estimator == EMA:
        d = tl.fma(-_number(numbers, CENTRE, real), mean, grad)
        raw = _loaded(s, rest, real, real, full, size)
        raw = _lerp(raw, d * d, _number(numbers, RHO_WEIGHT, real))
        _store(s, raw, rest, real, full, size)
    if estimator == GIVEN:
        raw = _loaded(s, rest, real, real, full, size)
    mean = _lerp(mean, grad, _number(numbers, BETA1_WEIGHT, real))
    square = _loaded(v, rest, real, real, full, size) * _number(numbers, BETA2, real)
    square = tl.fma(_number(numbers, BETA2_WEIGHT, real) * grad, grad, square)
    if estimator == SECOND_MOMENT:
        raw = square * _number(numbers, V_SCALE, real)
        raw = _at_least(tl.fma(-_number(numbers, M_SCALE_SQ, real) * mean, mean, raw), 0.0)
    _store(m, mean, rest, real, full, size)
    _store(v, square, rest, real, full, size)
    return mean, square, raw


@triton.jit
def _part(
    w,
    g,
    m,
    v,
    s,
    numbers,
    mean_sq,
    variance,
    rest,
    param_kind: tl.constexpr,
    grad_kind: tl.constexpr,
    real: tl.constexpr,
    estimator: tl.constexpr,
    mask: tl.constexpr,
    phase: tl.constexpr,
    full: tl.constexpr,
    size: tl.constexpr,
):
    """One block of one tensor.

    ``mean_sq`` and ``variance`` point to float64: sums over the block that MOMENTS writes, averages
    over the tensor that WEIGHTS reads.
    """
    if phase == WEIGHTS:
        mean = _loaded(m, rest, real, real, full, size)
        square = _loaded(v, rest, real, real, full, size)
        mean_sq_of_all, variance_of_all = tl.load(mean_sq).to(real), tl.load(variance).to(real)
        step = _gate(mean_sq_of_all, variance_of_all, numbers, mask, real) * mean
    else:
        mean, square, raw = _moments(
            g, m, v, s, numbers, rest, grad_kind, real, estimator, full, size
        )
        step = mean
        if phase == MOMENTS:
            tl.store(mean_sq, tl.sum((mean * mean).to(tl.float64)))
            tl.store(variance, tl.sum(raw.to(tl.float64)))
        elif mask != OPEN:
            step = _gate(mean * mean, raw, numbers, mask, real) * mean
    if phase != MOMENTS:
        scale = _quotient(_root(square, real), _number(numbers, V_CORRECTION, real), real)
        scale += _number(numbers, EPS, real)
        weight = _loaded(w, rest, param_kind, real, full, size) * _number(numbers, DECAY, real)
        weight += _quotient(-_number(numbers, RATE, real) * step, scale, real)
        _store(w, weight, rest, param_kind, full, size)


@triton.jit
def _pointer(address, kind: tl.constexpr, aligned: tl.constexpr):
    p = tl.load(address).to(tl.pointer_type(tl.uint16 if kind == tl.bfloat16 else kind))
    if aligned:  # so that loads and stores are of 16 bytes
        p = tl.multiple_of(p, 16)
    return p


@triton.jit(do_not_specialize=["tensors", "chunks"])
def update_listed(
    numbers,
    addresses,
    sizes,
    places,
    mean_sq,
    variance,
    tensors,
    chunks,
    param_kind: tl.constexpr,
    grad_kind: tl.constexpr,
    real: tl.constexpr,
    estimator: tl.constexpr,
    mask: tl.constexpr,
    phase: tl.constexpr,
    aligned: tl.constexpr,
    size: tl.constexpr,
):
    """Update many tensors: program k takes block ``places[1, k]`` of tensor ``places[0, k]``."""
    k = tl.program_id(0)
    j = tl.load(places + k)
    start = tl.load(places + chunks + k).to(tl.int64) * size
    rest = tl.load(sizes + j) - start
    w = _pointer(addresses + j, param_kind, aligned) + start
    g = _pointer(addresses + tensors + j, grad_kind, aligned) + start
    m = _pointer(addresses + 2 * tensors + j, real, aligned) + start
    v = _pointer(addresses + 3 * tensors + j, real, aligned) + start
    s = _pointer(addresses + 4 * tensors + j, real, aligned) + start
    here = k if phase == MOMENTS else j
    if rest >= size:
        _part(w, g, m, v, s, numbers, mean_sq + here, variance + here, rest,
              param_kind, grad_kind, real, estimator, mask, phase, True, size)  # fmt: skip
    else:
        _part(w, g, m, v, s, numbers, mean_sq + here, variance + here, rest,
              param_kind, grad_kind, real, estimator, mask, phase, False, size)  # fmt: skip


@triton.jit(do_not_specialize=["numel"])
def update_one(
    w,
    g,
    m,
    v,
    s,
    numbers,
    mean_sq,
    variance,
    taken,
    numel,
    param_kind: tl.constexpr,
    grad_kind: tl.constexpr,
    real: tl.constexpr,
    estimator: tl.constexpr,
    mask: tl.constexpr,
    phase: tl.constexpr,
    size: tl.constexpr,
):
    """Update one tensor if ``taken`` is not 0: its address and choices stay the same in a graph."""
    k = tl.program_id(0)
    start = k.to(tl.int64) * size
    rest = numel - start
    here = k if phase == MOMENTS else 0
    if tl.load(taken) != 0:
        if rest >= size:
            _part(w + start, g + start, m + start, v + start, s + start, numbers,
                  mean_sq + here, variance + here, rest,
                  param_kind, grad_kind, real, estimator, mask, phase, True, size)  # fmt: skip
        else:
            _part(w + start, g + start, m + start, v + start, s + start, numbers,
                  mean_sq + here, variance + here, rest,
                  param_kind, grad_kind, real, estimator, mask, phase, False, size)  # fmt: skip


@triton.jit
def _total(p, low, high, size: tl.constexpr):
    """The sum of the float64 numbers [low, high), in an order that is always the same."""
    lanes = tl.zeros((size,), tl.float64)
    for k in range(low, high, size):
        i = k + tl.arange(0, size)
        lanes += tl.load(p + i, mask=i < high, other=0.0)
    return tl.sum(lanes)


@triton.jit(do_not_specialize=["tensors"])
def pool_listed(mean_sq, variance, firsts, sizes, sums, tensors, size: tl.constexpr):
    """Sum what the blocks of each tensor hold, and note how many numbers that were."""
    j = tl.program_id(0)
    low, high = tl.load(firsts + j), tl.load(firsts + j + 1)
    tl.store(sums + j, _total(mean_sq, low, high, size))
    tl.store(sums + tensors + j, _total(variance, low, high, size))
    tl.store(sums + 2 * tensors + j, tl.load(sizes + j).to(tl.float64))


@triton.jit(do_not_specialize=["chunks", "numel", "tensors"])
def pool_one(mean_sq, variance, sums, chunks, numel, tensors, size: tl.constexpr):
    """The same of one tensor."""
    tl.store(sums, _total(mean_sq, 0, chunks, size))
    tl.store(sums + tensors, _total(variance, 0, chunks, size))
    tl.store(sums + 2 * tensors, numel.to(tl.float64))


@triton.jit
def _look(
    p,
    rest,
    beyond,
    bits: tl.constexpr,
    unsigned: tl.constexpr,
    limit: tl.constexpr,
    size: tl.constexpr,
):
    """Set ``beyond`` if a magnitude is above the limit, given as its bit pattern.

    Without their sign bit, which ``unsigned`` cuts off, floating-point numbers are ordered as
    integers, NaN above infinity.
    """
    i = tl.arange(0, size)
    x = tl.load(p.to(tl.pointer_type(bits)) + i, mask=i < rest, other=0)
    tl.store(beyond, 1, mask=tl.max(x & unsigned) > limit)


@triton.jit(do_not_specialize=["chunks"])
def look_listed(
    addresses,
    sizes,
    places,
    beyond,
    chunks,
    bits: tl.constexpr,
    unsigned: tl.constexpr,
    limit: tl.constexpr,
    size: tl.constexpr,
):
    """Look through many arrays."""
    k = tl.program_id(0)
    j = tl.load(places + k)
    start = tl.load(places + chunks + k).to(tl.int64) * size
    p = _pointer(addresses + j, bits, False) + start
    _look(p, tl.load(sizes + j) - start, beyond, bits, unsigned, limit, size)


@triton.jit(do_not_specialize=["numel"])
def look_one(
    g,
    beyond,
    numel,
    bits: tl.constexpr,
    unsigned: tl.constexpr,
    limit: tl.constexpr,
    size: tl.constexpr,
):
    """Look through one."""
    start = tl.program_id(0).to(tl.int64) * size
    _look(g.to(tl.pointer_type(bits)) + start, numel - start, beyond, bits, unsigned, limit, size)
