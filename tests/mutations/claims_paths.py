"""Plausible bugs of the claims about paths and memorization."""

from mutations import Mutation

MUTATIONS = {
    "what is gained with the wrong sign": Mutation(
        "poprisk_lab/studies/memorization.py",
        "difference(self.averaged(a, key, noises), self.averaged(b, key, noises))",
        "difference(self.averaged(b, key, noises), self.averaged(a, key, noises))",
        "test_claim_memorization.py::test_a_gate_that_keeps_labels_out_reproduces_the_claim",
    ),
    "the worst AdamW for the best": Mutation(
        "poprisk_lab/studies/memorization.py",
        "return max(grid",
        "return min(grid",
        "test_claim_memorization.py"
        "::test_controls_compare_with_the_best_of_the_grid_and_do_not_decide",
    ),
    "affine parts of a forecast with the wrong sign": Mutation(
        "poprisk_lab/studies/coupling.py",
        "train_moved + affine.train",
        "train_moved - affine.train",
        "test_claim_coupling.py::test_a_forecast_of_the_run_itself_is_its_coupling",
    ),
    "the setting that drifts most": Mutation(
        "poprisk_lab/studies/coupling.py",
        'over("peak", min)',
        'over("peak", max)',
        "test_claim_coupling.py::test_the_worst_setting_counts",
    ),
    "outputs at the start always taken off": Mutation(
        "poprisk_lab/studies/feature_learning.py",
        "y - start * tangent.train",
        "y - tangent.train",
        "test_claim_feature_learning.py::test_kernel_regression_is_that_of_the_definition[9.0]",
    ),
    "the near end of the interval": Mutation(
        "poprisk_lab/studies/drift_diffusion.py",
        "max(ends)",
        "min(ends)",
        "test_claim_drift_diffusion.py::test_a_distance_spans_the_interval",
    ),
}
