"""Plausible bugs of the risk estimators and the monitor."""

from mutations import Mutation

EXPECTATION = "test_risk_estimate.py::test_h_is_the_trace_in_expectation_over_all_signs"
RIDGE = "test_risk_estimate.py::test_the_ridge_path_gives_generalized_cross_validation"
ERROR = "test_risk_estimate.py::test_the_error_of_h_is_its_spread_over_signs"
TOGETHER = "test_risk_estimate.py::test_groups_alike_are_left_out_exactly"
HELD = "test_risk_curvature.py::test_examples_that_nothing_holds_do_not_raise_the_gain"
FREEDOM = "test_risk_links.py::test_freedom_is_the_trace"
LEFT_OUT = "test_risk_links.py::test_an_example_pulled_back_quadratically_is_left_out_exactly"
TILT = "test_risk_twin.py::test_the_twin_learns_tilted_labels"
BITWISE = "test_risk_twin.py::test_the_model_is_trained_bitwise_as_alone"
LINEAR = "test_risk_twin.py::test_h_of_a_linear_model_is_that_of_its_smoother"
RETRAINED = "test_risk_loo.py::test_a_frozen_kernel_equals_retraining_without_each_example"
OTHERS = "test_risk_loo.py::test_other_optimizers_take_their_own_steps_without_an_example"
GAP = "test_risk_gap.py::test_nothing_adapts_in_a_linear_model"
PARTS = "test_risk_estimate.py::test_parts_are_drawn_together_by_what_is_not_noise"
OWN = "test_risk_estimate.py::test_parts_have_their_own_response"
BY_NAME = "test_risk_twin.py::test_inputs_by_name_that_differ_later_are_refused"
OVERWRITTEN = "test_recorder.py::test_a_later_record_in_the_same_place_does_not_pass_for_the_first"
DELETED = "test_rundir.py::test_a_record_deleted_while_it_grows_does_not_go_on_half_empty"
FRESH = "test_risk_fresh.py::test_equals_the_sum_over_pairs"
MONITORED = "test_monitor.py::test_training_is_bitwise_the_same_with_and_without"
SIGNAL = "test_monitor.py::test_numbers_are_those_of_all_parts_of_the_step"

NO_MEMORY = "test_risk_canaries.py::test_all_memorized_is_one_and_none_is_zero_on_average"
CONTRAST = "test_risk_canaries.py::test_the_label_is_compared_with_other_wrong_ones"
EXTREME = "test_optimizer.py::test_squares_of_updates_neither_vanish_nor_overflow"
NO_EPS = "test_optimizer.py::test_a_coordinate_without_gradient_is_left_out_also_without_eps"
GATES = "test_optimizer.py::test_gate_stats_by_hand"

MUTATIONS = {
    "labels pushed the wrong way": Mutation(
        "poprisk/risk/twin.py",
        "return losses - follow\n",
        "return losses + follow\n",
        TILT,
    ),
    "signs not centred over classes": Mutation(
        "poprisk/risk/twin.py",
        "return (z - z.mean(1, keepdim=True)) / math.sqrt(square)",
        "return z",
        TILT,
    ),
    "signs of other examples in the estimate": Mutation(
        "poprisk/risk/twin.py",
        "scale * probe.perturbation(index, u.shape[1:], shift_invariant=shift_invariant)",
        "scale * probe.perturbation(index.flip(0), u.shape[1:], shift_invariant=shift_invariant)",
        LINEAR,
    ),
    "random numbers not rewound": Mutation(
        "poprisk/risk/twin.py",
        "            start.restore()\n            run.inputs",
        "            run.inputs",
        BITWISE,
    ),
    "random numbers left where the twin's are": Mutation(
        "poprisk/risk/twin.py", "        end.restore()\n", "        torch.rand(1)\n", BITWISE
    ),
    "response without the curvature": Mutation(
        "poprisk/risk/estimate.py",
        "follows = (local_loss.curvature(t) * moved).sum(1)",
        "follows = (t * moved).sum(1)",
        EXPECTATION,
    ),
    "a group left out one by one": Mutation(
        "poprisk/risk/grouped.py",
        "return within * (moves - common) + between.unsqueeze(1) * common",
        "return moves",
        TOGETHER,
    ),
    "an example counted among the others of its group": Mutation(
        "poprisk/risk/grouped.py",
        "total = sum(float(((sizes - 1) * row)",
        "total = sum(float((sizes * row)",
        TOGETHER,
    ),
    "examples that nothing holds weigh in the gain": Mutation(
        "poprisk/risk/estimate.py",
        "_agree(dof.dof, turned.dof.dof) and gains[1] <= turned.gains[1]",
        "False",
        HELD,
    ),
    "training that carries away believed as long": Mutation(
        "poprisk/risk/estimate.py",
        "if found.expansion <= MAX_EXPANSION:",
        "if True:",
        "test_risk_estimate.py::test_deep_interpolation_is_flagged",
    ),
    "half of the off-diagonal noise forgotten": Mutation(
        "poprisk/risk/estimate.py",
        "error = PAIRED * grouped_error",
        "error = grouped_error",
        ERROR,
    ),
    "left-out outputs moved towards the label": Mutation(
        "poprisk/risk/local_losses.py",
        "return outputs + gain * self.gradient",
        "return outputs - gain * self.gradient",
        LEFT_OUT,
    ),
    "response taken for the gain": Mutation(
        "poprisk/risk/estimate.py",
        "for rows, local_loss, _, gains in parts:\n"
        "        found[rows] = local_loss.leave_one_out(flat[rows], gains[1 + errors])",
        "for rows, local_loss, dof, _ in parts:\n"
        "        found[rows] = local_loss.leave_one_out(flat[rows], dof.dof)",
        RIDGE,
    ),
    "classes counted as free": Mutation(
        "poprisk/risk/local_losses.py",
        "return float(trace.mean()) / self.dimensions",
        "return float(trace.mean()) / self.p.shape[1]",
        FREEDOM,
    ),
    "a group judges the step it made": Mutation(
        "poprisk/risk/fresh.py",
        "others = [step(_without(mean, g, s))",
        "others = [step(mean)",
        FRESH,
    ),
    "a deleted example keeps its curvature": Mutation(
        "poprisk/risk/loo.py",
        "kept = share * ~gone",
        "kept = share.expand(gone.shape)",
        RETRAINED,
    ),
    "the momentum of a displacement forgotten": Mutation(
        "poprisk/path/recursion.py",
        "m.copy_(after)",
        "m.copy_(g)",
        RETRAINED,
    ),
    "decay of a displacement forgotten": Mutation(
        "poprisk/path/recursion.py", "_add(g, rule.coupled, z)", "pass", RETRAINED
    ),
    "decoupled decay of a displacement forgotten": Mutation(
        "poprisk/path/recursion.py", "_add(V, rule.decay * rule.steps, z)", "pass", OTHERS
    ),
    "a gap that is all of the twin's answer": Mutation(
        "poprisk/risk/gap.py", "[(moved - d, z) for", "[(moved + 0 * d, z) for", GAP
    ),
    "decay of what a push moved forgotten": Mutation(
        "poprisk/risk/gap.py", "quadrature=quadrature, decaying=True", "quadrature=quadrature", GAP
    ),
    "a perturbation per example that is not averaged": Mutation(
        "poprisk/risk/gap.py",
        "for t in twins], -1) / len(y)",
        "for t in twins], -1)",
        GAP,
    ),
    "parts not drawn together": Mutation(
        "poprisk/risk/estimate.py",
        "w = real / (real + own.dof_error**2)",
        "w = 1.0 + 0 * (own.dof_error**2)",
        PARTS,
    ),
    "left-out outputs of a part by its first examples": Mutation(
        "poprisk/risk/estimate.py",
        "leave_one_out(flat[rows], gains",
        "leave_one_out(flat[: len(flat[rows])], gains",
        OWN,
    ),
    "inputs by name not compared": Mutation(
        "poprisk/risk/inputs.py", "tree_leaves((args, kwargs))", "tree_leaves(args)", BY_NAME
    ),
    "the twin's perturbation twice": Mutation(
        "poprisk/risk/twin.py",
        "self.delta * self._scale[0]",
        "2 * self.delta * self._scale[0]",
        TILT,
    ),
    "an overwritten record is read": Mutation(
        "poprisk/path/store.py",
        "if found is None or found != self.written:",
        "if found is None:",
        OVERWRITTEN,
    ),
    "a deleted record is begun anew": Mutation(
        "poprisk_lab/store.py", "flags & ~os.O_CREAT", "flags", DELETED
    ),
    "the monitor leaves dropout drawn": Mutation(
        "poprisk/evaluation.py",
        "        undo.callback(RandomState.now().restore)\n",
        "        torch.rand(1)\n",
        MONITORED,
    ),
    "a look writes to the model's own buffers": Mutation(
        "poprisk/holders.py",
        'own["_buffers"][name] = copied(buffer, memo)',
        "pass",
        "test_evaluation.py::test_nothing_is_left_of_a_look",
    ),
    "a look writes to the attributes of objects": Mutation(
        "poprisk/holders.py",
        "self.owner.__dict__[name] = copied(value, memo)",
        "pass",
        "test_holders.py::test_state_of_every_kind_is_put_back",
    ),
    "what a first call makes stays": Mutation(
        "poprisk/holders.py",
        "if not _same_contents(own[name], before):",
        "if False:",
        "test_holders.py::test_what_a_first_call_makes_is_not_there_afterwards",
    ),
    "a backward pass in a look adds to the gradients": Mutation(
        "poprisk/evaluation.py",
        "p.grad = grad.detach().clone()",
        "p.grad = grad",
        "test_holders.py::test_a_backward_pass_inside_leaves_gradients_and_tells_no_hook",
    ),
    "a model that wrote to its weights once is trusted ever after": Mutation(
        "poprisk/evaluation.py",
        "_WRITES_WEIGHTS[model] = any(p in written for p in model.parameters())",
        "_WRITES_WEIGHTS[model] = False",
        "test_holders.py::test_weights_that_every_pass_writes_are_restored_every_time",
    ),
    "a model that may renormalize is trusted": Mutation(
        "poprisk/evaluation.py",
        "_WRITES_WEIGHTS.get(m, True) or _renormalizes(m)",
        "_WRITES_WEIGHTS.get(m, True)",
        "test_holders.py::test_renormalized_weights_are_restored_also_if_they_were_small_at_first",
    ),
    "a step that is left out is mixed with the next": Mutation(
        "poprisk/monitor/__init__.py",
        "        return not cleared\n",
        "        return True\n",
        "test_monitor_steps.py::test_a_step_that_a_scaler_leaves_out_is_not_mixed_with_the_next",
    ),
    "a row is closed before its last part": Mutation(
        "poprisk/monitor/__init__.py",
        "if self._statistics.parts >= self._expected and not self._ranks.pool():",
        "if self._statistics.parts == 1 and not self._ranks.pool():",
        "test_monitor_steps.py::test_a_row_is_that_of_all_parts_of_a_step",
    ),
    "a closure's second evaluation counts": Mutation(
        "poprisk/monitor/__init__.py",
        "            if self._inside:",
        "            if False:",
        "test_monitor_steps.py::test_a_closure_that_is_evaluated_several_times_gives_one_row_a_step",
    ),
    "examples that are ignored stand in pairs": Mutation(
        "poprisk/monitor/statistics.py",
        "Counts.of(int(counting[block].sum()))",
        "Counts.of(len(counting[block]))",
        "test_monitor_steps.py::test_ignored_labels_do_not_count",
    ),
    "signal with the examples' own squares": Mutation(
        "poprisk/monitor/signal.py", "(total - own) / (b * (b - 1))", "total / (b * b)", SIGNAL
    ),
    "noise divided by b - 1": Mutation(
        "poprisk/monitor/signal.py",
        "self.trace / self.batch",
        "self.trace / (self.batch - 1)",
        SIGNAL,
    ),
    "a share whose denominator is small where the signal is": Mutation(
        "poprisk/monitor/signal.py",
        "norm / (noise + abs(norm))",
        "norm / (noise + norm)",
        "test_signal.py::test_pure_noise_has_no_share_on_average",
    ),
    "the bend of a share stays in it": Mutation(
        "poprisk/monitor/signal.py",
        "return 2 * norm / size - shifted,",
        "return norm / size,",
        "test_signal.py::test_one_batch_is_biased_towards_zero_and_eight_are_not",
    ),
    "errors of a window are those of one step": Mutation(
        "poprisk/monitor/signal.py",
        "return math.sqrt(own) / k",
        "return math.sqrt(own / k)",
        "test_signal.py::test_numbers_of_several_steps_are_those_of_the_definition",
    ),
    "a share of one step is written": Mutation(
        "poprisk/monitor/window.py",
        "min(LEAST, self.size)",
        "min(1, self.size)",
        "test_signal.py::test_a_share_needs_four_steps_and_forgets_those_before_its_window",
    ),
    "examples left out are not in the batch": Mutation(
        "poprisk/monitor/statistics.py",
        "int(counting.sum()) + left_out",
        "int(counting.sum())",
        "test_signal.py::test_gains_and_biases_have_a_signal_of_their_own",
    ),
    "pairs count once": Mutation(
        "poprisk/monitor/signal.py",
        "across = 2 * (whole",
        "across = 1 * (whole",
        "test_monitor.py::test_numbers_are_those_of_all_parts_of_the_step",
    ),
    "canaries that kept their label count": Mutation(
        "poprisk/risk/canaries.py", "/ (k - 2))[planted != original]", "/ (k - 2))", NO_MEMORY
    ),
    "a planted label against all others": Mutation(
        "poprisk/risk/canaries.py",
        "own - (1 - own - replaced) / (k - 2)",
        "own - (1 - own) / (k - 1)",
        CONTRAST,
    ),
    "coordinates without a gradient count": Mutation(
        "poprisk/optim/replay.py",
        "gate_sums(q, passed, update, v.sign())",
        "gate_sums(q, passed, update, v.sign() + 1)",
        GATES,
    ),
    "squares of updates overflow": Mutation(
        "poprisk/optim/stats.py",
        "if not VANISHING < float(square) < math.inf:",
        "if False:",
        EXTREME,
    ),
    "an update over no denominator": Mutation(
        "poprisk/optim/replay.py",
        'eps = max(float(group["eps"]), torch.finfo(lists.exp_avgs[0].dtype).tiny)',
        'eps = float(group["eps"])',
        NO_EPS,
    ),
}
