"""Plausible bugs of the kernel and of the variance within a batch."""

from mutations import Mutation

MODELS = "test_kernel.py::test_equals_the_dense_jacobian[MLP]"
BLOCKS = "test_kernel.py::test_many_blocks_are_one_block"
SIZES = "test_within.py::test_microbatches_of_any_size"
FACTOR = "test_within.py::test_a_common_factor_counts"

MUTATIONS = {
    "upper triangle not filled": Mutation(
        "poprisk/ntk.py",
        "            if self.symmetric and i != j:\n                out[j : j + block.shape[1], i",
        "            if False:\n                out[j : j + block.shape[1], i",
        BLOCKS,
    ),
    "upper triangle left out of products": Mutation(
        "poprisk/ntk.py",
        "                out[j : j + width] += block.T @ columns[i : i + height]",
        "                pass",
        BLOCKS,
    ),
    "products without M": Mutation(
        "poprisk/ntk.py",
        "return {name: v * self._weights[name] for name, v in vector.items()}",
        "return vector",
        "test_kernel.py::test_preconditions_and_parameters[MLP]",
    ),
    "trace of the first output only": Mutation(
        "poprisk/ntk.py",
        "        for k in range(left.values):",
        "        for k in range(1):",
        MODELS,
    ),
    "forward mode wherever it exists": Mutation(
        "poprisk/ntk.py",
        "        if self._has_forward_mode:",
        "        if True:",
        "test_kernel.py::test_products_stop_where_gradients_stop",
    ),
    "weights left behind in shared modules": Mutation(
        "poprisk/jacobian.py",
        "for prefix, module in model.named_modules()\n",
        "for prefix, module in model.named_modules(remove_duplicate=False)\n",
        "test_kernel.py::test_equals_the_dense_jacobian",
    ),
    "rows that data moves taken for known": Mutation(
        "poprisk/per_sample/graph.py",
        "known.batches < TRUSTED or known.by_data",
        "known.batches < TRUSTED",
        "test_packed.py::test_the_variance_of_packed_documents_is_exact",
    ),
    "an index in order taken for one that moves": Mutation(
        "poprisk/per_sample/moved.py",
        "return index is None or (ordered is not None and ordered[0])",
        "return index is None",
        "test_packed.py::test_what_leaves_the_examples_in_place_is_known_after_some_batches",
    ),
    "another tower taken for weights": Mutation(
        "poprisk/per_sample/graph.py",
        "(changed or (told.batches == 0",
        "((told.batches == 0",
        "test_visible.py::test_contrast_between_two_towers_is_flagged_once_their_data_change",
    ),
    "larger batches not confirmed": Mutation(
        "poprisk/per_sample/plan.py",
        "return self.uses if confirmed(graph, values, self.uses) else None",
        "return self.uses",
        "test_kernel.py::test_a_structure_that_changes_with_the_batch_is_searched_again",
    ),
    "standard deviation as standard error": Mutation(
        "poprisk/linalg.py",
        "samples.std() / len(samples) ** 0.5",
        "samples.std()",
        "test_kernel.py::test_traces",
    ),
    "leading part counted twice": Mutation(
        "poprisk/spectrum.py",
        "rest = torch.addmm(signs, V, V.T @ signs, alpha=-1)",
        "rest = signs.clone()",
        "test_spectrum.py::test_every_figure_is_the_dense_one_within_its_error",
    ),
    "slope of the square forgotten": Mutation(
        "poprisk/spectrum.py",
        "ratio * self.error(2 / trace, -1 / square, 0.0)",
        "ratio * self.error(1 / trace, 0.0, 0.0)",
        "test_spectrum.py::test_two_errors_hold_about_95_of_100_estimates",
    ),
    "error of quadrature left out": Mutation(
        "poprisk/spectrum.py",
        "rank * (probes + self.bound / trace)",
        "rank * probes",
        "test_spectrum.py::test_one_step_of_quadrature_is_told_by_its_error",
    ),
    "node at zero forgotten": Mutation(
        "poprisk/spectrum.py",
        "radau = _entropy_mean(torch.cat([alpha, last.unsqueeze(1)], dim=1), beta)",
        "radau = _entropy_mean(alpha, beta[:, :-1])",
        "test_spectrum.py::test_quadrature_bounds_the_entropy_and_closes_in",
    ),
    "images left behind by a restart": Mutation(
        "poprisk/linalg.py",
        "    for rows in (basis, images):",
        "    for rows in (basis,):",
        "test_spectrum.py::test_a_restarted_basis_finds_the_same",
    ),
    "gap to the next eigenvalue taken as found": Mutation(
        "poprisk/spectrum.py",
        "gaps = values[:k] - values[k] - residuals[k]",
        "gaps = values[:k]",
        "test_spectrum.py::test_targets_in_a_leading_space_that_is_not_told_apart",
    ),
    "divided by J instead of J-1": Mutation(
        "poprisk/optim/batch_variance.py", "/ (self.parts - 1)", "/ self.parts", SIZES
    ),
    "size of a part ignored": Mutation(
        "poprisk/optim/batch_variance.py", ".div_(size)", ".div_(1)", SIZES
    ),
    "factor not squared": Mutation(
        "poprisk/optim/batch_variance.py",
        "self.examples * factor**2",
        "self.examples * factor",
        FACTOR,
    ),
    "a gradient probed at even distances": Mutation(
        "poprisk/optim/gradient_probe.py",
        "    mixed = flat.numel() // CHUNK * CHUNK\n",
        "    return flat[:: flat.numel() // SMALL].clone()\n    mixed = 0\n",
        "test_within.py::test_changes_of_a_part_of_a_gradient_are_refused",
    ),
    "what is left after the last mixture not probed": Mutation(
        "poprisk/optim/gradient_probe.py",
        "return torch.cat([mixtures, flat[mixed:]])",
        "return mixtures",
        "test_within.py::test_every_entry_counts_in_a_probe",
    ),
    "writes through data not seen": Mutation(
        "poprisk/optim/batch_variance.py",
        "return same and self.probe.holds(grad)",
        "return same",
        "test_within.py::test_gradients_changed_through_data_between_two_parts_are_refused",
    ),
    "average with beta1 instead of its square": Mutation(
        "poprisk/optim/variance.py",
        "return beta1**2 if",
        "return beta1 if",
        "test_within.py::test_the_average_is_the_variance_of_the_momentum",
    ),
    "variance of an example, not of the mean": Mutation(
        "poprisk/per_sample/__init__.py",
        "squared(self.sums[name]) / b) / (b * (b - 1))",
        "squared(self.sums[name]) / b) / (b - 1)",
        "test_within.py::test_grad_mean_var_in_chunks",
    ),
}
