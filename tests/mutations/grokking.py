"""Plausible bugs of the claim on grokking."""

from mutations import Mutation

DELAY = "test_claim_grokking_delay.py"

MUTATIONS = {
    "decay as if nothing were gated": Mutation(
        "poprisk_lab/studies/grokking/decay.py",
        "self.weight_decay * mask * start",
        "self.weight_decay * start",
        "test_claim_grokking.py::test_decay_behind_the_gate",
    ),
    "the edge without the preconditioner": Mutation(
        "poprisk_lab/studies/grokking/forces.py",
        "(scale.unsqueeze(1) * columns).unbind(1)",
        "columns.unbind(1)",
        "test_claim_grokking.py"
        "::test_the_edge_is_the_largest_curvature_in_the_optimizers_metric[adamw]",
    ),
    "growth with the decay in it": Mutation(
        "poprisk_lab/studies/grokking/forces.py",
        "after - (1 - shrink) * before",
        "after - before",
        "test_claim_grokking.py::test_growth_and_shrinkage_along_the_weights",
    ),
    "the goal met on the training set": Mutation(
        "poprisk_lab/studies/grokking/runs.py",
        '"reached": first(rows, 3, GOAL)',
        '"reached": first(rows, 2, GOAL)',
        "test_claim_grokking.py::test_at_most_sixty_points_of_a_curve_are_kept_the_last_among_them",
    ),
    "random numbers not taken up again": Mutation(
        "poprisk_lab/studies/grokking/runs.py",
        'torch.set_rng_state(saved["random"])',
        "pass",
        "test_claim_grokking.py::test_a_run_that_was_stopped_ends_with_the_same_numbers[shuffled]",
    ),
    "the equals sign asks from another place": Mutation(
        "poprisk_lab/tasks/modular.py",
        "self._heads(normed[:, -1:], normed)",
        "self._heads(normed[:, :1], normed)",
        "test_claim_grokking.py"
        "::test_the_network_is_an_ordinary_transformer_block[2-1-per_example]",
    ),
    "the lead of the channel with the wrong sign": Mutation(
        "poprisk_lab/studies/grokking/__init__.py",
        "criteria.difference(network, entered)",
        "criteria.difference(entered, network)",
        "test_claim_grokking.py::test_the_lead_of_the_channel_is_counted_in_measurements",
    ),
    "steps compared beyond what one side was watched for": Mutation(
        "poprisk_lab/studies/criteria.py",
        "horizon = min(slow.horizon, fast.horizon)",
        "horizon = slow.horizon",
        "test_reproduce.py::test_a_fast_run_that_never_gets_there_counts_against_it",
    ),
    "a run that was stopped counts as there": Mutation(
        "poprisk_lab/studies/criteria.py",
        "cut = [step is None for",
        "cut = [False for",
        "test_reproduce.py::test_the_log_rank_test_takes_stopped_runs_as_censored",
    ),
    "delays that count the fit of the training set": Mutation(
        "poprisk_lab/studies/grokking/delay.py",
        'd.metrics["reached"] - d.metrics["memorized"]',
        'd.metrics["reached"]',
        f"{DELAY}::test_seeds_of_a_setting_count_once_with_their_mean_logarithm",
    ),
    "a half width of fewer coefficients": Mutation(
        "poprisk_lab/studies/grokking/delay.py",
        ".sum() / (n - k - 1)",
        ".sum() / (n - k)",
        f"{DELAY}::test_the_interval_is_that_of_least_squares",
    ),
    "norms compared the other way round": Mutation(
        "poprisk_lab/studies/grokking/delay.py",
        "squares[steps[0]] / squares[steps[1]]",
        "squares[steps[1]] / squares[steps[0]]",
        f"{DELAY}::test_the_norm_is_compared_where_either_set_is_right",
    ),
    "Muon for the outputs as well": Mutation(
        "poprisk_lab/arms.py",
        "isinstance(m, nn.Linear)][:-1]",
        "isinstance(m, nn.Linear)]",
        f"{DELAY}::test_muon_takes_the_weights_of_hidden_linear_layers",
    ),
    "a rate of Muon that is not AdamW's": Mutation(
        "poprisk_lab/arms.py",
        '"use_adjusted_lr": True',
        '"use_adjusted_lr": False',
        f"{DELAY}::test_a_learning_rate_of_muon_is_that_of_adamw",
    ),
}
