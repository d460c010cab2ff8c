"""Plausible bugs of the claims on benign overfitting, double descent and implicit bias."""

from mutations import Mutation

HALVES = "test_claim_implicit_bias.py::test_half_times_by_hand"

MUTATIONS = {
    "half of the squared residual": Mutation(
        "poprisk_lab/studies/directions.py",
        "gone = along <= along[0] / 2",
        "gone = along.square() <= along[0].square() / 2",
        HALVES,
    ),
    "what is never learned is learned at once": Mutation(
        "poprisk_lab/studies/directions.py",
        "return torch.where(gone.any(0), first, len(gradients))",
        "return first",
        HALVES,
    ),
    "the nearest interpolant forgets the start": Mutation(
        "poprisk_lab/studies/descent.py",
        "nearest = w0 + torch.linalg.pinv(x) @ (y - x @ w0)",
        "nearest = w0 + torch.linalg.pinv(x) @ y",
        "test_claim_implicit_bias.py::test_from_another_start_it_is_the_nearest",
    ),
    "an early gain is the last one": Mutation(
        "poprisk_lab/studies/double_descent.py",
        "dataclasses.replace(ops.integrals, G=G)",
        "ops.integrals",
        "test_claim_double_descent.py::test_an_early_gain_is_that_of_a_run_that_stopped_there",
    ),
    "the least noise gain is its peak": Mutation(
        "poprisk_lab/studies/double_descent.py",
        "gain.index(max(gain))",
        "gain.index(min(gain))",
        "test_claim_double_descent.py::test_peaks_are_apart_by_weights",
    ),
    "a factor counts one way only": Mutation(
        "poprisk_lab/studies/criteria.py",
        "abs(math.log(d.metrics[a] / d.metrics[b]))",
        "math.log(d.metrics[a] / d.metrics[b])",
        "test_claim_benign_overfitting.py::test_a_factor_counts_both_ways_and_the_worst_setting",
    ),
    "noise is predicted by its deviation": Mutation(
        "poprisk_lab/studies/label_noise.py",
        "short(std**2 * gain.path)",
        "short(std * gain.path)",
        "test_claim_benign_overfitting.py::test_redrawn_noise_is_what_training_on_it_anew_does",
    ),
}
