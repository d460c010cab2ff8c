"""Plausible bugs of the kernel in Triton and of its launches."""

from mutations import Mutation

KERNEL = "poprisk/optim/fused/kernel_triton.py"
LAUNCH = "poprisk/optim/fused/launch_triton.py"
REFERENCE = "test_triton.py::test_triton_is_the_reference[listed-ema-None-auto-soft]"
POOLED = "test_triton.py::test_triton_is_the_reference[listed-ema-per_tensor-paper-soft]"
CAPTURED = "test_triton.py::test_triton_is_the_reference[one by one-ema-None-auto-soft]"
LAYOUTS = "test_triton.py::test_triton_is_foreach_for_all_layouts_at_once[ema-None-auto-soft]"
SETTINGS = "test_triton.py::test_triton_is_foreach_for_other_settings"
MAXIMIZE, FLOOR, HALF, BFLOAT16 = (
    f"{SETTINGS}[dtype{k}]"
    for k in (
        "0-{'maximize': True}",
        "0-{'q_min': 0.3}",
        "0-{'betas': (0.3, 0.4), 'rho': 0.2}",
        "2-{'maximize': True}",
    )
)
UNCHANGED = "test_triton.py::test_a_bad_gradient_at_the_end_leaves_the_beginning_unchanged"

MUTATIONS = {
    "the mean used after its update": Mutation(
        KERNEL,
        "        d = tl.fma(-_number(numbers, CENTRE, real), mean, grad)\n",
        "        mean_now = _lerp(mean, grad, _number(numbers, BETA1_WEIGHT, real))\n"
        "        d = tl.fma(-_number(numbers, CENTRE, real), mean_now, grad)\n",
        REFERENCE,
    ),
    "the variance not centred": Mutation(
        KERNEL,
        "d = tl.fma(-_number(numbers, CENTRE, real), mean, grad)",
        "d = grad",
        REFERENCE,
    ),
    "weight decay forgotten": Mutation(
        KERNEL, "full, size) * _number(numbers, DECAY, real)", "full, size)", REFERENCE
    ),
    "the sign forgotten": Mutation(
        KERNEL, "grad = _number(numbers, SIGN, real) * _loaded", "grad = _loaded", MAXIMIZE
    ),
    "no floor": Mutation(
        KERNEL, "q = _at_least(q, _number(numbers, Q_MIN, real))", "q = q + 0.0", FLOOR
    ),
    "lerp of small weights only": Mutation(
        KERNEL, "tl.where(weight < 0.5, tl.fma", "tl.where(weight < 2, tl.fma", HALF
    ),
    "bfloat16 cut off": Mutation(
        KERNEL, "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "bits >> 16", BFLOAT16
    ),
    "the end of a tensor taken for whole": Mutation(
        KERNEL,
        "x = tl.load(at) if full else tl.load(at, mask=tl.arange(0, size) < rest, other=0)",
        "x = tl.load(at) if full else tl.load(at, mask=tl.arange(0, size) + 1 < rest, other=0)",
        LAYOUTS,
    ),
    "captured: gated while there is no estimate": Mutation(
        KERNEL, "return tl.where(_number(numbers, OPENED, real) > 0, 1.0, q)", "return q", CAPTURED
    ),
    "captured: a NaN enters": Mutation(
        KERNEL, "    if tl.load(taken) != 0:\n", "    if tl.load(taken) >= 0:\n", UNCHANGED
    ),
    "NaN not looked for in the last gradient": Mutation(
        LAUNCH,
        "for g in map(_real, grads):",
        "for g in map(_real, grads[:-1]):",
        "test_triton.py::test_a_gradient_that_is_not_finite_is_found_anywhere",
    ),
    "NaN not looked for at the end": Mutation(
        KERNEL,
        "x = tl.load(p.to(tl.pointer_type(bits)) + i, mask=i < rest, other=0)",
        "x = tl.load(p.to(tl.pointer_type(bits)) + i, mask=i + 1 < rest, other=0)",
        "test_triton.py::test_a_gradient_that_is_not_finite_is_found_anywhere",
    ),
    "averages of the first block": Mutation(
        KERNEL,
        "low, high = tl.load(firsts + j), tl.load(firsts + j + 1)",
        "low, high = tl.load(firsts + j), tl.load(firsts + j) + 1",
        "test_triton.py::test_triton_is_foreach_for_all_layouts_at_once[ema-per_tensor-auto-soft]",
    ),
    "the mean in place of the variance of a tensor": Mutation(
        KERNEL,
        "tl.store(sums + tensors + j, _total(variance, low, high, size))",
        "tl.store(sums + tensors + j, _total(mean_sq, low, high, size))",
        POOLED,
    ),
    "tensors that share memory at once": Mutation(
        LAUNCH,
        "if len(set(starts)) < len(starts):",
        "if len(set(starts)) < 0:",
        "test_triton.py::test_parameters_that_share_memory_move_one_after_the_other",
    ),
}
