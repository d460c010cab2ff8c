"""Plausible bugs of what is measured before one tries, and of the rule."""

from mutations import Mutation

FILE = "poprisk_lab/advise/measuring.py"
SPLIT = "test_advise.py::test_split_halves_are_what_a_loop_over_coordinates_gives"

MUTATIONS = {
    "noise counted as signal": Mutation(
        FILE,
        "signal = b.mean(0).square() - b.var(0) / half",
        "signal = b.mean(0).square()",
        "test_advise.py::test_pure_noise_has_no_signal",
    ),
    "coordinates measured on the half that chose them": Mutation(
        FILE, "signal[a.mean(0).abs()", "signal[b.mean(0).abs()", SPLIT
    ),
    "noise scale of a block": Mutation(
        FILE,
        "float(size * g.var(0).sum())",
        "float(g.var(0).sum())",
        "test_advise.py::test_the_noise_scale_of_single_examples_is_the_exact_one",
    ),
    "trained on what is held out": Mutation(
        FILE,
        "train, outside = (select(x, kept), y[kept])",
        "train, outside = (select(x, held), y[held])",
        "test_advise.py::test_the_held_out_loss_is_that_of_the_arm_which_stops_early",
    ),
    "error of a mean in place of the jackknife's": Mutation(
        FILE,
        "math.sqrt((k - 1) / k *",
        "math.sqrt(1 / k *",
        "test_advise.py::test_pooling_is_a_ratio_of_sums_with_its_jackknife",
    ),
    "networks taken for linear models": Mutation(
        "poprisk_lab/advise/rule.py",
        "if found.layers > 1:",
        "if found.layers <= 1:",
        "test_advise.py::test_thresholds_part_the_kinds",
    ),
}
