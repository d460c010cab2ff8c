"""Plausible bugs of the native kernel, of sharding and of captured steps."""

from mutations import Mutation

SETTINGS = "test_fused.py::test_fused_is_foreach_for_other_settings"
LAYOUTS = "test_fused.py::test_fused_is_foreach_for_all_layouts_at_once"
REFERENCE = "test_fused.py::test_fused_is_the_reference"
NOT_FINITE = "test_fused.py::test_a_gradient_that_is_not_finite_is_found_anywhere"
CAPTURED = "test_captured.py::test_captured_steps_are_the_reference"
GATED = "test_gated_fused.py::test_fused_is_foreach_for_other_settings"
KERNEL = "poprisk/optim/fused/kernel.cpp"
WRAPPED = "poprisk/optim/fused/wrapped.hpp"

MUTATIONS = {
    "kernel: mean used after its update": Mutation(
        KERNEL,
        "      variance = observed(s[i], mean, grad, c);\n",
        "      variance = observed(s[i], lerp(mean, grad, c.beta1_weight), grad, c);\n",
        REFERENCE,
    ),
    "kernel: variance of the last step": Mutation(
        KERNEL,
        "      variance = observed(s[i], mean, grad, c);\n      s[i] = variance;",
        "      variance = s[i];\n      s[i] = observed(s[i], mean, grad, c);",
        REFERENCE,
    ),
    "kernel: gated weight decay": Mutation(
        KERNEL,
        "    w[i] = moved(w[i] * c.decay, step, square, c);\n    m[i] = mean;",
        "    w[i] = moved(step == 0 ? w[i] : w[i] * c.decay, step, square, c);\n    m[i] = mean;",
        REFERENCE,
    ),
    "kernel: no floor": Mutation(
        KERNEL, "  return at_least(signal / total, c.q_min);", "  return signal / total;", SETTINGS
    ),
    "kernel: the sign forgotten": Mutation(
        KERNEL,
        "    const real grad = c.sign * g[i];\n    real mean",
        "    const real grad = g[i];\n    real mean",
        SETTINGS,
    ),
    "kernel: lerp of small weights only": Mutation(
        KERNEL, "near = weight < real(0.5);", "near = weight < real(2);", SETTINGS
    ),
    "kernel: bfloat16 cut off": Mutation(
        KERNEL, "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16", SETTINGS
    ),
    "kernel: the last block left out": Mutation(
        KERNEL, "i < to; i += stride", "i + 1 < to; i += stride", SETTINGS
    ),
    "kernel: NaN not looked for in the tail": Mutation(
        KERNEL, "int64_t i = 2 * half; i < to - from", "int64_t i = 2 * half; i < 0", NOT_FINITE
    ),
    "kernel: NaN looked for in one stream": Mutation(
        KERNEL, "stream * half + i + k", "i + k", NOT_FINITE
    ),
    "averages per tensor over the wrong count": Mutation(
        "poprisk/optim/fused/__init__.py",
        "gate.averages(totals, numels,",
        "gate.averages(totals, [n + 1 for n in numels],",
        REFERENCE,
    ),
    "gradients of another layout taken as they are": Mutation(
        "poprisk/optim/fused/__init__.py",
        "return g if g.stride() == w.stride() else",
        "return g if g.numel() == w.numel() else",
        "test_optimizer.py::test_large_tensors_with_gradients_of_another_layout",
    ),
    "wrapped: the average before the deviation": Mutation(
        WRAPPED,
        "    if constexpr (estimator == EMA) s[i] = observed(s[i], m[i], g[i], c);\n"
        "    m[i] = lerp(m[i], g[i], c.beta1_weight);\n",
        "    m[i] = lerp(m[i], g[i], c.beta1_weight);\n"
        "    if constexpr (estimator == EMA) s[i] = observed(s[i], m[i], g[i], c);\n",
        GATED,
    ),
    "wrapped: the mask the wrong way round": Mutation(
        WRAPPED, "lerp(from, to, gate<real", "lerp(to, from, gate<real", GATED
    ),
    "wrapped: decay of the weights before and after confused": Mutation(
        WRAPPED, "decay == OF_START ? from : kept", "decay == OF_RESULT ? from : kept", GATED
    ),
    "wrapped: the kept step told as the whole": Mutation(
        WRAPPED, "start[i] = to - from;", "start[i] = kept - from;", GATED
    ),
    "wrapped: bfloat16 weights not written back": Mutation(
        KERNEL, "if (narrow_param && writes)", "if (narrow_param && writes && t.grads)", GATED
    ),
    "wrapped: weights that overlap taken one after the other": Mutation(
        "poprisk/optim/fused/wrapped.py",
        "start + size > following for",
        "start > following for",
        "test_gated_fused.py::test_parameters_with_gaps_or_shared_memory_are_left_to_foreach",
    ),
    "wrapped: other devices' tensors left out": Mutation(
        "poprisk/optim/fused/wrapped.py",
        "columns.params[0].device):\n        return None, every\n",
        "columns.params[0].device):\n        return None, []\n",
        "test_gated_fused.py::test_other_devices_are_left_to_foreach",
    ),
    "wrapped: foreach observes what the kernel has observed": Mutation(
        "poprisk/optim/keep.py",
        "        columns = columns.subset(left)\n        torch._foreach_copy_",
        "        torch._foreach_copy_",
        "test_gated_fused.py::test_parameters_with_gaps_or_shared_memory_are_left_to_foreach",
    ),
    "captured: gated while there is no estimate": Mutation(
        "poprisk/optim/settings.py", "opened=inflation == 0 if", "opened=inflation < 0 if", CAPTURED
    ),
    "captured: the first gradient observed": Mutation(
        "poprisk/optim/variance.py",
        "(counts.observations > 0).double()",
        "(counts.t > 0).double()",
        CAPTURED,
    ),
    "captured: a NaN enters": Mutation(
        "poprisk/optim/groups.py",
        "x.copy_(torch.where(finite, x, before))",
        "x.copy_(x)",
        "test_captured.py::test_a_compiled_step_is_one_graph[eager]",
    ),
    "checkpoints not written atomically": Mutation(
        "poprisk_lab/checkpoint.py",
        'temporary = path.with_suffix(f".{os.getpid()}.tmp")',
        "temporary = path",
        "test_checkpoint.py",
    ),
}
