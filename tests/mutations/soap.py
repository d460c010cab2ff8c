"""Plausible bugs of the gate in a Kronecker basis."""

from mutations import Mutation

REFERENCE = "test_soap.py::test_many_steps_are_those_of_the_reference"
PARTS = "test_soap.py::test_parts_of_a_batch_are_the_batch"

MUTATIONS = {
    "squares carried over like means": Mutation(
        "poprisk/optim/kronecker.py",
        "by = squares if key in SQUARES else change",
        "by = change",
        REFERENCE,
    ),
    "averages left in the old basis": Mutation(
        "poprisk/optim/kronecker.py",
        "        state[key] = new\n    carry_(",
        "        state[key] = new\n    (lambda *_: 0)(",
        REFERENCE,
    ),
    "variance of the coordinates": Mutation(
        "poprisk/optim/batch_variance.py",
        "squares_of(rotated).reshape(p.shape)",
        "squares_of(terms).reshape(p.shape)",
        REFERENCE,
    ),
    "variance around the mean of the coordinates": Mutation(
        "poprisk/optim/batch_variance.py",
        "grad = self.turned(p, factor)\n        if grad is None:",
        "grad = _grad(p)\n        if grad is None:",
        REFERENCE,
    ),
    "the turned gradient as before a factor": Mutation(
        "poprisk/optim/batch_variance.py",
        "return noted.turned.grad if factor == 1 else noted.turned.grad * factor",
        "return noted.turned.grad",
        "test_soap.py::test_clipped_and_unscaled_gradients_are_seen_as_such",
    ),
    "the turned gradient of the last part alone": Mutation(
        "poprisk/optim/batch_variance.py",
        "else turned.plus(last)",
        "else turned",
        PARTS,
    ),
    "a changed entry not seen": Mutation(
        "poprisk/optim/batch_variance.py",
        "if not noted.probe.holds_times(factor, grad):",
        "if grad is None:",
        "test_soap.py::test_the_gradient_is_turned_as_it_is",
    ),
    "a side's first basis not taken up by its averages": Mutation(
        "poprisk/optim/kronecker.py",
        "changes.append(new if old is None else",
        "changes.append(None if old is None else",
        "test_soap.py::test_a_raised_limit_rotates_the_other_side_too",
    ),
    "factors of two kinds in one average": Mutation(
        "poprisk/optim/kronecker.py",
        "            state.pop(key, None)\n        state[OF_GRADIENTS]",
        "            pass\n        state[OF_GRADIENTS]",
        "test_soap.py::test_the_size_of_a_loss_does_not_matter_whatever_the_lengths",
    ),
    "the kind of the factors forgotten": Mutation(
        "poprisk/optim/example_factors.py",
        "kept = before.of_gradients or OF_GRADIENTS in self.optimizer.state.get(p, {})",
        "kept = False",
        "test_soap.py::test_factors_of_examples_are_what_is_said",
    ),
    "an average of another variance goes on": Mutation(
        "poprisk/optim/adamw.py",
        "forget_variance_(self.state.get(p, {}))",
        "pass",
        "test_within.py::test_another_variance_begins_its_own_average",
    ),
    "a first step of matrices decayed like biases": Mutation(
        "poprisk/optim/soap.py",
        "(as_yet if any(sides) else for_good)",
        "for_good",
        "test_soap.py::test_the_first_step_is_one_of_coordinates",
    ),
    "a size of what is added up, whatever cancels": Mutation(
        "poprisk/per_sample/moments.py",
        "return _formed(terms)[1].sum()",
        "return _formed(terms)[1].sum() * 1e4",
        "test_soap.py::test_a_gradient_changed_on_its_way_is_noticed_where_positions_cancel",
    ),
    "parts of a batch that was cleared": Mutation(
        "poprisk/optim/adamw.py",
        "self._notes.parts.restart_if_cleared()",
        "pass",
        "test_soap.py::test_a_gate_may_be_switched_on_after_a_step_that_was_left_out",
    ),
    "squares of what is not gated": Mutation(
        "poprisk/optim/batch_variance.py",
        "squares=p in wanted)",
        "squares=True)",
        "test_soap.py::test_squares_are_formed_where_a_gate_takes_them",
    ),
    "coordinates gated like bases": Mutation(
        "poprisk/optim/settings.py",
        'own = {"z": self.settings["coordinate_z"], "slack": 0.0}',
        'own = {"z": self.settings["z"], "slack": 0.0}',
        "test_soap.py::test_without_a_rotation_it_is_the_coordinate_gate",
    ),
    "biases decayed like matrices": Mutation(
        "poprisk/optim/settings.py",
        "return min(decay, PLAIN_DECAY) if own is None else",
        "return decay if own is None else",
        "test_soap.py::test_what_keeps_its_coordinates_is_decayed_by_less",
    ),
    "the rule of a step with the matrices' decay": Mutation(
        "poprisk/optim/replay.py",
        "group = _of_parameter(compiled(context.group), p, state)",
        "group = compiled(context.group)",
        "test_soap.py::test_what_keeps_its_coordinates_is_decayed_by_less",
    ),
    "statistics of a gate that was not": Mutation(
        "poprisk/optim/replay.py",
        "return group if any(key in state for key in BASES) else",
        "return group if not any(key in state for key in BASES) else",
        "test_soap.py::test_without_a_rotation_it_is_the_coordinate_gate",
    ),
    "a hook's small change not seen": Mutation(
        "poprisk/optim/batch_variance.py",
        "found[p] = _Share(grad, squares, None if p._backward_hooks else sums.turned)",
        "found[p] = _Share(grad, squares, sums.turned)",
        "test_soap.py::test_the_gradient_is_turned_as_it_is",
    ),
    "the sides of the factors exchanged": Mutation(
        "poprisk/optim/kronecker.py",
        "return ExampleSums((None, output), (mixed, None))",
        "return ExampleSums((output, None), (None, mixed))",
        "test_soap.py::test_layers_of_all_kinds_are_rotated_where_they_can_be",
    ),
    "the step not turned back": Mutation(
        "poprisk/optim/groups.py",
        "w.add_(rotation.back(step))",
        "w.add_(rotation.forward(step))",
        REFERENCE,
    ),
    "slack added": Mutation(
        "poprisk/optim/update.py", "alpha=-tolerated", "alpha=tolerated", REFERENCE
    ),
    "factors as before clipping": Mutation(
        "poprisk/optim/soap.py",
        "left, right = found.total(self._noted().scales[p] ** 2)",
        "left, right = found.total()",
        "test_soap.py::test_factors_follow_a_factor_on_the_gradient",
    ),
    "a factor on the loss counted on the side of the inputs": Mutation(
        "poprisk/optim/kronecker.py",
        "return plus_pair(scaled_pair(self.gradients, scale), self.inputs)",
        "return scaled_pair(plus_pair(self.gradients, self.inputs), scale)",
        "test_soap.py::test_a_factor_on_the_loss_does_not_change_an_embedding",
    ),
    "factors of sides that are not rotated": Mutation(
        "poprisk/optim/soap.py",
        "return left if sides[0] else None, right if sides[1] else None",
        "return left, right",
        "test_soap.py::test_a_limit_lowered_before_the_first_step_counts",
    ),
    "changed gradients seen too late": Mutation(
        "poprisk/optim/soap.py",
        "self._noted().find_scales([p for p in rotated if p.grad is not None])",
        "self._noted().scales = dict.fromkeys(rotated, 1.0)",
        "test_soap.py::test_gradients_that_were_changed_are_refused_before_anything_moves",
    ),
    "averages of another basis taken up": Mutation(
        "poprisk/optim/state.py",
        'if "max_dim" in saved and "max_dim" not in own:',
        'if "max_dim" in saved and "max_dim" not in saved:',
        "test_soap.py::test_coordinates_refuse_averages_of_bases",
    ),
    "parameters read twice": Mutation(
        "poprisk/optim/adamw.py",
        'param_group["params"] = [params] if isinstance(params, Tensor) else list(params)',
        'param_group["params"] = [params] if isinstance(params, Tensor) else params',
        "test_soap.py::test_a_group_may_be_a_generator",
    ),
    "eigenvectors of the last batch alone": Mutation(
        "poprisk/optim/kronecker.py",
        "average.lerp_(local(factor).to(average.dtype), 1 - decay)",
        "average.copy_(local(factor))",
        REFERENCE,
    ),
    "settings of a state refused too late": Mutation(
        "poprisk/optim/soap.py",
        'self._check_group({**theirs, "params": mine["params"]})',
        "mine.update({k: v for k, v in theirs.items() if k != 'params'}), self._check_group(mine)",
        "test_soap.py::test_settings_of_a_state_are_refused_before_anything_changes",
    ),
    "rows looked up left in their coordinates": Mutation(
        "poprisk/optim/kronecker.py",
        "return basis[activation.indices]\n",
        "return activation  # pyrefly: ignore\n",
        "test_soap.py::test_what_is_noted_in_a_basis_is_of_the_examples",
    ),
    "gradients noted in a basis that is gone": Mutation(
        "poprisk/optim/example_factors.py",
        "if any(a is not b for a, b in",
        "if any(a is not None and b is None for a, b in",
        "test_soap.py::test_a_basis_that_changed_since_the_gradients_were_noted_is_refused",
    ),
    "factors of a batch that was refused": Mutation(
        "poprisk/optim/batch_variance.py",
        "        for p in found:\n            self._check_untouched(p)\n        if self.bases",
        "        for n, terms in factors.terms.items():\n"
        "            self.bases and self.bases.seen(self.params[n], terms, share)\n"
        "        for p in found:\n            self._check_untouched(p)\n        if self.bases",
        "test_soap.py::test_factors_of_a_batch_that_was_refused_do_not_count",
    ),
    "bases left in the old precision": Mutation(
        "poprisk/optim/state.py",
        "TENSORS = {*ADAM_KEYS, *VARIANCE_KEYS, *FACTORS, *BASES}",
        "TENSORS = {*ADAM_KEYS, *VARIANCE_KEYS}",
        "test_soap.py::test_bases_follow_a_model_to_another_precision",
    ),
    "statistics of a basis found after the step": Mutation(
        "poprisk/optim/soap.py",
        "if _step_of_sums(state) == int(",
        "if _step_of_sums(state) != int(",
        "test_soap.py::test_statistics_are_of_the_gate_of_the_step",
    ),
    "another variance than was asked for": Mutation(
        "poprisk_lab/fit.py",
        "if optimizer.told_by_loop() is None:",
        "if optimizer is None:",
        "test_training.py::test_bases_from_the_gradient_keep_their_variance",
    ),
    "gradients from elsewhere without a basis": Mutation(
        "poprisk/optim/soap.py",
        "if elsewhere or (needed and parts.parts == 0):",
        "if needed and parts.parts == 0:",
        "test_soap.py::test_a_gradient_from_elsewhere_is_refused_before_anything_moves",
    ),
}
