"""Plausible bugs of influence through a run."""

from mutations import Mutation

ADAM = "test_attribution.py::test_a_step_of_adam_in_closed_form_is_the_one_by_autograd"
ZEROS = "test_attribution.py::test_inputs_that_are_always_zero_have_no_say[AdamW]"
INFLUENCE = "test_attribution.py::test_influence_is_the_derivative_by_the_weight_of_a_loss"
MEMORY = "test_attribution.py::test_a_gradient_is_kept_for_the_way_back_as_memory_allows[AdamW]"
PASSES = "test_attribution.py::test_no_more_gradients_are_taken_than_steps"
ROUNDED = (
    "test_attribution.py::"
    "test_kernels_that_round_otherwise_with_a_graph_are_gone_through_without[momentum]"
)
ATTENTION = (
    "test_attribution.py::test_attention_is_trained_by_a_kernel_that_can_be_differentiated_twice"
)
RANDOM = "test_attribution.py::test_random_shares_are_disjoint_and_weigh_one_on_average[0.25]"
HALF = "test_attribution.py::test_what_holds_without_a_few_need_not_hold_for_a_random_half"
ALIKE = "test_attribution.py::test_shares_at_random_of_examples_that_are_all_alike_tell_nothing"
BATCH = (
    "test_influence_magic.py::test_a_batch_is_that_of_a_step_and_its_loss_has_the_same_gradient[3]"
)
SCALE = "test_attribution_study.py::test_the_distance_of_two_estimates_knows_no_scale"
TWICE = "test_attribution_study.py::test_a_half_of_the_examples_counts_twice"

MUTATIONS = {
    "second moments answer with the wrong sign": Mutation(
        "poprisk/attribution/adam.py",
        "div_(root).mul_(-0.5 / c)",
        "div_(root).mul_(0.5 / c)",
        f"{ADAM}[plain-AdamW]",
    ),
    "no correction of the momentum's bias backwards": Mutation(
        "poprisk/attribution/adam.py",
        "mul_(-lr / (1 - beta1**self.step))",
        "mul_(-lr)",
        f"{ADAM}[plain-AdamW]",
    ),
    "coupled decay does not reach the weights": Mutation(
        "poprisk/attribution/adam.py",
        "else w + decay * g",
        "else w",
        f"{ADAM}[decayed-Adam]",
    ),
    "the largest second moment answers always": Mutation(
        "poprisk/attribution/adam.py",
        "own = self.second == self.largest",
        "own = self.second > self.largest",
        f"{ADAM}[largest-AdamW]",
    ),
    "the root of a second moment of zero": Mutation(
        "poprisk/attribution/adam.py",
        "root.clamp_min_(torch.finfo(root.dtype).tiny ** 0.5)",
        "root.clamp_min_(0)",
        ZEROS,
    ),
    "Nesterov's own share of the gradient is lost": Mutation(
        "poprisk/attribution/adjoint.py",
        "g = _plus(_times(rule.gain, m), rule.from_gradient, r)",
        "g = _times(rule.gain, m)",
        f"{INFLUENCE}[momentum-1]",
    ),
    "a graph that does not fit is kept": Mutation(
        "poprisk/attribution/training.py",
        "self.left -= self.per_example * examples",
        "self.left -= 0",
        MEMORY,
    ),
    "gradients are taken again on the way back": Mutation(
        "poprisk/attribution/training.py",
        "yield BackwardStep(weights, batch, share, pull, graph)",
        "yield BackwardStep(weights, batch, share, pull)",
        PASSES,
    ),
    "graphs that end elsewhere are believed": Mutation(
        "poprisk/attribution/training.py",
        "if graphs.kept and not self._ends(end):",
        "if False:",
        ROUNDED,
    ),
    "attention trains by its fused kernel": Mutation(
        "poprisk/attribution/training.py",
        "with plain_kernels(model):",
        "with contextlib.nullcontext():",
        ATTENTION,
    ),
    "shares at random are not made up for": Mutation(
        "poprisk/attribution/influence.py",
        "kept = torch.randperm(n, generator=generator), n / (n - count)",
        "kept = torch.randperm(n, generator=generator), 1.0",
        RANDOM,
    ),
    "both shares are the same": Mutation(
        "poprisk/attribution/influence.py",
        "removals[1][order[-count:]]",
        "removals[1][order[:count]]",
        RANDOM,
    ),
    "any draw will do for the check": Mutation(
        "poprisk/attribution/influence.py",
        "if correlation >= CORRELATES:",
        "if correlation >= 0.5:",
        HALF,
    ),
    "examples that are all alike agree": Mutation(
        "poprisk/attribution/influence.py",
        "return (ALIKE if bool(influence.any()) else NOTHING), math.nan",
        'return "", math.nan',
        ALIKE,
    ),
    "a half counts once": Mutation(
        "poprisk_lab/studies/attribution.py", "] = 1 / KEPT", "] = 1.0", TWICE
    ),
    "bergson does not weigh the losses": Mutation(
        "poprisk_lab/studies/influence_magic.py", " * example_weight).mean()", ").mean()", BATCH
    ),
    "bergson's weights are by place in the batch": Mutation(
        "poprisk_lab/studies/influence_magic.py",
        "weights = self.weights[i]",
        "weights = self.weights[: len(i)]",
        BATCH,
    ),
    "bergson's schedule is that of the first step": Mutation(
        "poprisk_lab/studies/influence_magic.py",
        "if others or any(settings != done.settings[0] for settings in done.settings):",
        "if others:",
        "test_influence_magic.py::test_a_training_that_bergson_cannot_take_up_is_refused"
        "[a schedule]",
    ),
    "the distance of estimates at their own scales": Mutation(
        "poprisk_lab/studies/attribution.py", "/ a.square().sum() * a - b)", "* 0 + a - b)", SCALE
    ),
}
