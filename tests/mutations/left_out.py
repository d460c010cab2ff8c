"""Faults of twins that are trained without a part of the examples."""

from mutations import Mutation

FILE = "poprisk/risk/left_out.py"
NAIVE = "test_risk_left_out.py::test_an_estimate_is_its_naive_form"
AS_WITHOUT = "test_risk_left_out.py::test_twins_are_trained_as_without_their_examples"
FOLLOWED = "test_risk_left_out.py::test_a_twin_follows_another_loop_without_examples"
LENGTHS = "test_risk_left_out.py::test_sequences_of_any_length"
STATE = "test_risk_left_out.py::test_a_state_goes_on_and_fits_no_other_twin"
TOKENS = "test_risk_left_out.py::test_next_token_is_the_mean_over_known_tokens"

MUTATIONS = {
    "the others count no more than before": Mutation(
        FILE, "self.weight = len(out) / int((~out).sum())", "self.weight = 1.0", AS_WITHOUT
    ),
    "those trained on taken for those left out": Mutation(
        FILE,
        "(~self.out[index.to(self.out.device)])",
        "self.out[index.to(self.out.device)]",
        AS_WITHOUT,
    ),
    "twins without the same examples": Mutation(
        FILE, "order[: probes * count].split(count)", "[order[:count]] * probes", AS_WITHOUT
    ),
    "the control the wrong way": Mutation(
        FILE, "b * (losses.mean() - mine.mean())", "b * (mine.mean() - losses.mean())", NAIVE
    ),
    "an error that the part left out has no share in": Mutation(
        FILE, "len(losses) / len(mine) * (left", "(left", NAIVE
    ),
    "a leverage forgotten": Mutation(
        FILE, "1 / len(mine) + centred.square()", "centred.square()", NAIVE
    ),
    "no weight in another loop": Mutation(
        "poprisk/risk/lockstep.py",
        "grads.append(weight * beyond",
        "grads.append(0 * beyond",
        FOLLOWED,
    ),
    "a weight added to its own in another loop": Mutation(
        "poprisk/risk/lockstep.py",
        "(probe.weights(seen.index) - 1)",
        "probe.weights(seen.index)",
        FOLLOWED,
    ),
    "texts padded otherwise taken for other ones": Mutation(
        "poprisk/risk/twin.py", "known &= self.lengths", "self.lengths", LENGTHS
    ),
    "a twin goes on as another kind": Mutation(
        "poprisk/risk/twin.py",
        'SIGNS if self.leave_out is None else f"without {self.leave_out:g}"',
        "SIGNS",
        STATE,
    ),
    "a token predicted from itself": Mutation(
        "poprisk/losses.py", "logits[:, :-1].flatten(0, 1)", "logits[:, 1:].flatten(0, 1)", TOKENS
    ),
}
