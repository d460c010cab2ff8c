"""Plausible bugs of the path operators, channel and drift."""

from mutations import Mutation

REFERENCE = "test_path.py::test_equals_the_reference[squared_error-momentum]"
NESTEROV = "test_path.py::test_equals_the_reference[squared_error-Nesterov]"
ADAMW = "test_path.py::test_equals_the_reference[cross_entropy-AdamW]"
ACCOUNTING = "test_path.py::test_the_loss_drop_is_accounted_for[AdamW]"
FOLLOW = "test_follow.py::test_following_vectors_is_applying_the_operators[AdamW]"
CELLS = "test_channel.py::test_the_cells_are_those_of_the_definition"
COUPLING = "test_channel.py::test_the_coupling_is_that_of_the_definition"
PARTS = "test_channel.py::test_the_parts_of_the_transfer_error_add_up[AdamW-random-1e-12]"
GAIN = "test_channel.py::test_noise_gain_is_the_variance_of_noisy_labels"
DRIFT = "test_drift.py::test_drift_and_diffusion_are_the_sums_of_the_definition"

ROWS = "test_path.py::test_rows_are_those_of_torch_func"
DECAYING = "test_follow.py::test_decay_that_acts_on_what_was_moved_adds_up_too[AdamW]"
WALKS = "test_drift.py::test_known_powers_are_found[1.0]"

MUTATIONS = {
    "decay that grows what was moved": Mutation(
        "poprisk/path/recursion.py",
        "self.moved[rows] -= V",
        "self.moved[rows] += V",
        DECAYING,
    ),
    "propagator with the wrong sign": Mutation(
        "poprisk/path/integrals.py",
        "self.X -= _blocks(B, moved)",
        "self.X += _blocks(B, moved)",
        REFERENCE,
    ),
    "dissipation of the transposed map": Mutation(
        "poprisk/path/integrals.py",
        "self.W.addmm_(R.T, R, alpha=abs(scale) / rule.steps)",
        "self.W += abs(scale) * R[: len(self.W)] @ R[: len(self.W)]",
        REFERENCE,
    ),
    "preconditioner left out of the dissipation": Mutation(
        "poprisk/path/integrals.py",
        "self.W.addmm_(R.T, scale.abs() * R, alpha",
        "self.W.addmm_(R.T, R, alpha",
        ADAMW,
    ),
    "no bias correction of the momentum": Mutation(
        "poprisk/path/recursion.py",
        "V = r * (rule.correction * rule.precondition)",
        "V = r * rule.precondition",
        ADAMW,
    ),
    "decay left out of the affine part": Mutation(
        "poprisk/path/recursion.py",
        "_add(V, rule.decay * rule.steps, z)",
        "_add(V, -rule.decay * rule.steps, z)",
        ADAMW,
    ),
    "coupled decay left out": Mutation(
        "poprisk/path/recursion.py", "_add(r, gain * rule.coupled, z)", "pass", REFERENCE
    ),
    "a factor with the wrong sign": Mutation(
        "poprisk/path/jacobian.py",
        "(term.cotangent[:, k].mT, term.activation)",
        "(term.cotangent[:, k].mT, -term.activation)",
        ROWS,
    ),
    "nodes of the quadrature that overwrite each other": Mutation(
        "poprisk/path/jacobian.py", "beta=int(i > 0)", "beta=0", ROWS
    ),
    "weights of the quadrature lost": Mutation(
        "poprisk/path/jacobian.py", "capture(weight * jacobian", "capture(1.0 * jacobian", REFERENCE
    ),
    "windows that overlap the first point": Mutation(
        "poprisk/path/drift.py", "walks[:, ::lag].diff(dim=1)", "walks[:, 1::lag]", WALKS
    ),
    "momentum brought in forgotten": Mutation(
        "poprisk/path/recursion.py",
        "momentum[:, -1] = run.momentum_in.to(dtype)",
        "momentum[:, -1] = 0.0",
        "test_path.py::test_momentum_that_was_there_before_is_affine",
    ),
    "Nesterov reads the momentum only": Mutation(
        "poprisk/optim/step.py",
        "from_gradient=1.0 if nesterov else 0.0",
        "from_gradient=0.0",
        NESTEROV,
    ),
    "gradient at the start in place of its mean": Mutation(
        "poprisk/path/integrals.py",
        "mean = average_gradient(problem, self.u, u - self.u).flatten()",
        "mean = problem.output_gradient(self.u).flatten()",
        ACCOUNTING,
    ),
    "output Hessian at the start": Mutation(
        "poprisk/path/integrals.py",
        "B = average_hessian(problem, self.u, u - self.u)",
        "B = average_hessian(problem, self.u, 0 * u)",
        ADAMW,
    ),
    "sampling without n/b": Mutation(
        "poprisk/path/watch.py",
        "counts.double() * (self.problem.n / len(batch))",
        "counts.double()",
        "test_path.py::test_the_identities_close[SGD]",
    ),
    "matrix-free without sampling": Mutation(
        "poprisk/path/march.py",
        "pull(sampling.to(w)[:, None, None] * X)",
        "pull(X)",
        FOLLOW,
    ),
    "decay that begins later left out": Mutation(
        "poprisk/path/march.py",
        "self.affine, self.moved = True, wider(self.moved)",
        "self.moved = wider(self.moved)",
        "test_online.py::test_decay_that_begins_later_and_rates_that_change[AdamW]",
    ),
    "the settings of the first parameter for all": Mutation(
        "poprisk/optim/step.py",
        "if all(not isinstance(v, Tensor) and v == values[0] for v in values):",
        "if not isinstance(values[0], Tensor):",
        "test_online.py::test_parameters_have_settings_of_their_own",
    ),
    "outputs of the next steps moved from an older place": Mutation(
        "poprisk/path/march.py",
        "self.origin, self.fresh = self.w, True",
        "self.fresh = True",
        "test_follow.py::test_the_cells_add_up_to_the_movement[SGD]",
    ),
    "chords walked backwards": Mutation(
        "poprisk/path/online.py",
        "march.moved[:, 0] = march.origin - w",
        "march.moved[:, 0] = w - march.origin",
        "test_online.py::test_the_noise_alone_says_how_far_its_chords_are_off",
    ),
    "a momentum from before left out": Mutation(
        "poprisk/path/online.py",
        "carried = momentum if bool(momentum.any()) else None",
        "carried = None",
        "test_online.py::test_momentum_from_before_is_affine",
    ),
    "reservoir and channel exchanged": Mutation(
        "poprisk/path/four_cells.py",
        "parts = (kept, signal - kept, let, noise - let)",
        "parts = (signal - kept, kept, noise - let, let)",
        CELLS,
    ),
    "noise with the sign of the signal": Mutation(
        "poprisk/path/trace.py",
        "return signal, problem.output_gradient(u) - signal",
        "return signal, signal - problem.output_gradient(u)",
        CELLS,
    ),
    "coupling through the transposed transfer": Mutation(
        "poprisk/path/coupling.py",
        "torch.linalg.pinv(integrals.D @ F, rtol=RTOL)",
        "torch.linalg.pinv(integrals.D.T @ F, rtol=RTOL)",
        COUPLING,
    ),
    "noise gain without 1/n": Mutation(
        "poprisk/path/coupling.py",
        "loss = problem.loss(problem.shaped(at), labels).sum() / n",
        "loss = problem.loss(problem.shaped(at), labels).sum()",
        GAIN,
    ),
    "diffusion holds the drift": Mutation(
        "poprisk/path/drift.py", "(sampled - 1) * g", "sampled * g", DRIFT
    ),
    "transfer error without the affine part": Mutation(
        "poprisk/path/coupling.py",
        "closure = (query + affine.query + G @ g)",
        "closure = (query + G @ g)",
        PARTS,
    ),
    "mismatch with the wrong sign": Mutation(
        "poprisk/path/coupling.py", "        mismatch @ c,", "        -mismatch @ c,", PARTS
    ),
    "gradient not whitened for the channel": Mutation(
        "poprisk/path/coupling.py",
        "c = channel.eigenvalues.sqrt() * (",
        "c = channel.eigenvalues * (",
        PARTS,
    ),
    "what no predictor sees, of the predictor at hand": Mutation(
        "poprisk/path/coupling.py",
        "unseen = G @ F - coupling_matrix(integrals, channel) @ C_S",
        "unseen = G @ F - A @ C_S",
        "test_channel.py::test_the_transfer_error_is_that_of_any_predictor[2]",
    ),
}
