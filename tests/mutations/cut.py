"""Plausible bugs of runs whose model detaches what it hands on, and of the rules that do so."""

from mutations import Mutation

CLOSES = "test_cut.py::test_the_identities_close_however_it_is_cut[SGD-detach]"
FOLLOWS = "test_cut.py::test_following_vectors_is_applying_the_operators"
KERNEL = "test_cut.py::test_the_kernel_is_of_both_jacobians"
STRIDED = "test_cut.py::test_a_record_of_every_second_step_is_of_both_jacobians"
DRIFT = "test_cut.py::test_drift_and_diffusion_are_of_outputs_as_they_move"
REFUSED = "test_cut.py::test_what_needs_second_derivatives_refuses"
STRAIGHT = "test_cut.py::test_a_straight_through_estimator_is_kept"
FLAGS = "test_cut.py::test_flags_set_on_what_is_detached_stay_there"
GOODNESS = "test_local_nets.py::test_goodness_is_the_mean_square_with_each_label_in_the_input[1.0]"
LOCAL = "test_local_nets.py::test_no_layer_learns_from_the_loss_of_another[forward-forward]"
HARD = "test_local_nets.py::test_the_loss_is_that_of_hinton_in_expectation_over_wrong_labels[hard]"
RANDOM = (
    "test_local_nets.py::test_the_loss_is_that_of_hinton_in_expectation_over_wrong_labels[random]"
)
MEMORIZED = "test_local_nets.py::test_tasks_know_what_was_memorized[digits-mono-forward]"
IDX = "test_idx.py::test_every_type_comes_back[>i2-11]"

MUTATIONS = {
    "outputs that move by their own gradients": Mutation(
        "poprisk/path/quadrature.py",
        "self.problem.J_whole.write(total, at, x)",
        "self.problem.J.write(total, at, x)",
        CLOSES,
    ),
    "vectors that move by their own gradients": Mutation(
        "poprisk/path/march.py",
        "self.problem.J_whole.jvp(torch.lerp(self.origin, self.w, a), x, self.moved)",
        "self.problem.J.jvp(torch.lerp(self.origin, self.w, a), x, self.moved)",
        FOLLOWS,
    ),
    "a kernel of the movement alone": Mutation(
        "poprisk/path/integrals.py",
        "self.v.flatten(), g, J @ self._training(J).T",
        "self.v.flatten(), g, J @ J.T",
        KERNEL,
    ),
    "a frozen predictor of the movement alone": Mutation(
        "poprisk/path/integrals.py",
        "J_T = self._training(J).T",
        "J_T = J.T",
        KERNEL,
    ),
    "strides that are trained as outputs move": Mutation(
        "poprisk/path/integrals.py",
        "if J is None or self.problem.is_cut:",
        "if J is None:",
        STRIDED,
    ),
    "drift by the gradients' own Jacobian": Mutation(
        "poprisk/path/drift.py",
        "problem.J_whole.jvp(w, x, scale * both)",
        "problem.J.jvp(w, x, scale * both)",
        DRIFT,
    ),
    "the worse of two Jacobians": Mutation(
        "poprisk/path/problem.py",
        "_chord_error(whole, w, x) < _chord_error(self.J, w, x)",
        "_chord_error(whole, w, x) > _chord_error(self.J, w, x)",
        CLOSES,
    ),
    "a derivative that follows nothing": Mutation(
        "poprisk/path/problem.py",
        "_chord_error(J, end, x) < FOLLOWS for",
        "_chord_error(J, end, x) < 10 for",
        "test_cut.py::test_a_straight_through_estimator_is_kept_however_coarse[signs]",
    ),
    "weights that no gradient reaches counted": Mutation(
        "poprisk/path/problem.py",
        "apart = (others - rows)[self._reached(x)]",
        "apart = others - rows",
        "test_cut.py::test_features_without_gradients_are_no_cut",
    ),
    "leave-one-out without one loss": Mutation(
        "poprisk/risk/loo.py", "check_uncut(run.problem, ", "print(run.problem, ", REFUSED
    ),
    "an input that is marked by whoever detaches it": Mutation(
        "poprisk/uncut.py",
        "if func in _CUTS and _is_followed(args[0]):",
        "if func in _CUTS:",
        FLAGS,
    ),
    "goodness that the next layer can read": Mutation(
        "poprisk_lab/tasks/local_nets.py",
        "h = h / (goodness + TINY).sqrt()",
        "h = h * 1.0",
        GOODNESS,
    ),
    "layers that learn from those above": Mutation(
        "poprisk_lab/tasks/local_nets.py",
        "self.activation(layer(h.detach()))\n            goodness",
        "self.activation(layer(h))\n            goodness",
        LOCAL,
    ),
    "a right label among the wrong ones": Mutation(
        "poprisk_lab/tasks/local_nets.py",
        "scores.masked_fill(right > 0, -torch.inf).softmax(1)",
        "scores.softmax(1)",
        HARD,
    ),
    "wrong labels that weigh more than right ones": Mutation(
        "poprisk_lab/tasks/local_nets.py",
        "q = (1 - right) / (outputs.shape[1] - 1)",
        "q = 1 - right",
        RANDOM,
    ),
    "memorization of the first layer": Mutation(
        "poprisk/task/__init__.py",
        "share = self.scored_by.function if own else accuracy",
        "share = accuracy",
        MEMORIZED,
    ),
    "bytes in the order of the machine": Mutation(
        "poprisk_lab/tasks/idx.py", '0x0B: ">i2"', '0x0B: "<i2"', IDX
    ),
}
