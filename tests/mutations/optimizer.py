"""Plausible bugs of the gate, the optimizer and the wrapper."""

from mutations import Mutation

REFERENCE = "test_optimizer.py::test_equals_the_reference_with_other_settings"
SIZES = "test_gate.py::test_alpha_auto_in_the_optimizer"
THRESHOLDS = "test_optimizer.py::test_equals_the_reference_with_every_threshold"
PATHS = "test_optimizer.py::test_foreach_is_the_loop_for_all_layouts_at_once"
DECAY = "test_optimizer.py::test_weight_decay_is_not_gated"
TERMS = "test_terms.py::test_equals_the_reference"
NOT_FINITE = "test_optimizer_state.py::test_a_gradient_that_is_not_finite_changes_nothing"
NOT_FINITE_GATED = "test_gated.py::test_a_gradient_that_is_not_finite_changes_nothing"

MUTATIONS = {
    "terms: fresh examples charged as repeated ones": Mutation(
        "poprisk/optim/sizes.py",
        'fresh = 1.0 if paper and alpha == "auto" else 0.0',
        "fresh = 1.0",
        "test_terms.py::test_charges",
    ),
    "terms: only their sum looked at": Mutation(
        "poprisk/optim/adamw.py",
        "if not (taken and all_finite([*terms.values()])):",
        "if not taken:",
        "test_terms.py::test_terms_that_cancel_do_not_hide_what_cannot_be_squared",
    ),
    "terms: weighted by their charges, not the roots": Mutation(
        "poprisk/optim/terms.py",
        "share = own.detach().to(state_dtype(p)) * charge**0.5",
        "share = own.detach().to(state_dtype(p)) * charge",
        "test_terms.py::test_what_is_charged_is_the_sum_of_the_variances_each_by_its_ratio",
    ),
    "terms: average of another age": Mutation(
        "poprisk/optim/update.py",
        "own = counts._replace(t=counts.observations + 1)",
        "own = counts",
        "test_terms.py::test_terms_that_come_in_the_middle_of_a_run_begin_with_an_open_gate",
    ),
    "terms: a factor since is not seen": Mutation(
        "poprisk/optim/terms.py",
        "p: self._weighted[p] * factor\n",
        "p: self._weighted[p]\n",
        "test_terms.py::test_a_factor_on_the_sum_counts_for_the_terms",
    ),
    "terms: charged beyond the dearest": Mutation(
        "poprisk/optim/gate.py", ".clamp_(least, most)", ".clamp_(least)", TERMS
    ),
    "balance: fitted faster than it is": Mutation(
        "poprisk/optim/balance.py",
        ".clamp(0.0, 1.0).sqrt()",
        ".clamp(0.0, 1.0)",
        "test_balance.py::test_it_bounds_what_is_left_of_the_error_in_a_quadratic",
    ),
    "balance: noise of the batches taken for gradient": Mutation(
        "poprisk/optim/balance.py",
        "moved = mean_scale**2 * mean_sq - balance.kept * var_scale * var",
        "moved = mean_scale**2 * mean_sq",
        "test_balance.py::test_equals_the_reference_where_terms_oppose",
    ),
    "balance: h of another size than the gradient": Mutation(
        "poprisk/optim/balance.py",
        "(balance.most * moved / held)",
        "(moved / held)",
        "test_balance.py::test_the_noise_of_the_batches_is_taken_off_both",
    ),
    "balance: seen and not used": Mutation(
        "poprisk/optim/gate.py",
        "torch._foreach_mul_(ratios, list(shares))",
        "pass",
        "test_balance.py::test_equals_the_reference_where_terms_oppose",
    ),
    "balance: h of another age": Mutation(
        "poprisk/optim/settings.py",
        "own = counts._replace(t=counts.observations + 1)",
        "own = counts",
        "test_balance.py::test_h_is_corrected_for_the_steps_that_it_has_seen",
    ),
    "balance: of a piece of a tensor": Mutation(
        "poprisk/optim/groups.py",
        "whole_tensors = whole_tensors or bool(lists.term_grads)\n",
        "whole_tensors = bool(whole_tensors)\n",
        "test_balance.py::test_a_tensor_that_would_be_cut_is_looked_at_whole",
    ),
    "terms: an average kept while the gate is off": Mutation(
        "poprisk/optim/state.py",
        "if key in state and (estimator is None or key not in",
        "if key in state and estimator is not None and (key not in",
        "test_terms.py::test_terms_begin_anew_after_the_gate_was_off",
    ),
    "terms: left out of the state's precision": Mutation(
        "poprisk/optim/state.py",
        'VARIANCE_KEYS = ("grad_mean_var", *TERM_KEYS)',
        'VARIANCE_KEYS = ("grad_mean_var",)',
        "test_terms.py::test_the_state_keeps_its_precision_and_shape_when_loaded",
    ),
    "mean used after its update": Mutation(
        "poprisk/optim/update.py",
        "estimator.observe_(s, g, m, counts)",
        "estimator.observe_(s, g, [x.lerp(y, 1 - counts.beta1) for x, y in zip(m, g)], counts)",
        REFERENCE,
    ),
    "no bias correction of the variance": Mutation(
        "poprisk/optim/variance.py",
        "return 1 / (1 - self.rho ** (k.clamp_min(1) if counts.captured else k))",
        "return 1.0",
        REFERENCE,
    ),
    "no bias correction of the mean in the gate": Mutation(
        "poprisk/optim/variance.py", "return 1 / (1 - self.beta1**self.t)", "return 1.0", REFERENCE
    ),
    "no bias correction of the mean in the step": Mutation(
        "poprisk/optim/update.py",
        "settings.lr / (1 - counts.beta1**counts.t)",
        "settings.lr",
        REFERENCE,
    ),
    "variance divided by b-1 again": Mutation(
        "poprisk/optim/gate.py",
        "return z * z * (noise_ratio + finite) / inflation",
        "return z * z * (noise_ratio + finite) / inflation / 4",
        SIZES,
    ),
    "gated weight decay": Mutation(
        "poprisk/optim/update.py",
        "            torch._foreach_mul_(q, m)\n",
        "            decay = settings.lr * settings.weight_decay\n"
        "            torch._foreach_mul_(w, [(1 - decay * x) / (1 - decay) for x in q])\n"
        "            torch._foreach_mul_(q, m)\n",
        DECAY,
    ),
    "threshold ignored": Mutation(
        "poprisk/optim/gate.py",
        "            alpha=alpha,\n",
        "            alpha=1.0,\n",
        THRESHOLDS,
    ),
    "foreach leaves the end of large tensors out": Mutation(
        "poprisk/optim/update.py",
        "for piece in pieces(lists.subset([i])):",
        "for piece in pieces(lists.subset([i]))[:1]:",
        PATHS,
    ),
    "foreach leaves the last block out": Mutation(
        "poprisk/optim/update.py", "    if block:\n", "    if len(block) > 99:\n", PATHS
    ),
    "NaN enters the state": Mutation(
        "poprisk/optim/adamw.py",
        "self._use_parts()\n            return loss\n",
        "self._use_parts()\n",
        NOT_FINITE,
    ),
    "NaN enters the state of a wrapper": Mutation(
        "poprisk/optim/wrapper.py",
        "self.skipped_steps)\n            return loss\n",
        "self.skipped_steps)\n",
        NOT_FINITE_GATED,
    ),
}
