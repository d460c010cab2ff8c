"""Plausible bugs of the claim on grokking."""

from mutations import Mutation

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
}
