"""Plausible bugs of the claims on a differential equation and on a picture."""

from mutations import Mutation

SLOPES = "test_tasks_fields.py::test_residuals_are_derivatives_by_automatic_differentiation"
NAIVE_GRADIENT = "test_tasks_fields.py::test_gradients_of_the_residuals_are_those_of_the_naive_way"
ALONE = "test_tasks_fields.py::test_values_are_those_of_each_network_alone"
SOLUTION = "test_tasks_fields.py::test_the_solution_solves_the_equation_and_starts_at_the_sine"
CLEAN = "test_tasks_fields.py::test_the_test_set_is_the_picture_without_its_noise"
PLACES = "test_tasks_fields.py::test_places_are_pixel_centres_row_by_row"
SPREAD = "test_tasks_fields.py::test_a_siren_starts_with_phases_of_one_spread"
LOSS = "test_claim_pinn.py::test_the_loss_is_that_of_the_naive_way"
EPOCH = "test_claim_pinn.py::test_batches_hold_each_measurement_once_an_epoch_and_fresh_points"
KEPT = "test_claim_pinn.py::test_what_is_kept_is_the_first_step_at_the_goal_and_both_ends"
FASTER = "test_claim_pinn.py::test_a_gate_that_is_faster_by_the_paper_s_factor_reproduces_the_claim"
SLOWER = "test_claim_pinn.py::test_a_gate_that_is_slower_and_ends_worse_does_not"
STAYS = "test_claim_image.py::test_a_gate_that_stays_and_wins_reproduces_the_claim"
FITS_NOISE = "test_claim_image.py::test_a_gate_that_fits_the_noise_too_does_not"
HINDSIGHT = (
    "test_claim_image.py::test_adamw_is_chosen_by_its_end_and_in_hindsight_by_its_best_moment"
)
DECIBELS = "test_claim_image.py::test_psnr_is_twenty_decibels_at_a_tenth"
AS_FAR = "test_claim_optimizers.py::test_the_control_moves_as_far_as_the_arm_at_each_step"
GROUPED = "test_claim_optimizers.py::test_trials_are_grouped_by_optimizer_and_controls_stand_apart"
SHUFFLED = "test_claim_optimizers.py::test_a_shuffled_arm_shuffles_its_own_mask"

MUTATIONS = {
    "slope of tanh at the values of other points": Mutation(
        "poprisk_lab/tasks/convection.py",
        "dh = (1 - h[:, n:].square()) * dh",
        "dh = (1 - h[:, : both - n].square()) * dh",
        SLOPES,
    ),
    "slope of tanh held fixed in the gradient": Mutation(
        "poprisk_lab/tasks/convection.py",
        "dh = (1 - h[:, n:].square()) * dh",
        "dh = (1 - h[:, n:].square()).detach() * dh",
        NAIVE_GRADIENT,
    ),
    "bias added to the tangent": Mutation(
        "poprisk_lab/tasks/convection.py",
        "h, dh = z[:, :both] + bias, z[:, both:]",
        "h, dh = z[:, :both] + bias, z[:, both:] + bias",
        SLOPES,
    ),
    "one network's weights for all": Mutation(
        "poprisk_lab/tasks/convection.py",
        "weight = torch.stack([layer.weight for layer in same])",
        "weight = torch.stack([same[0].weight for layer in same])",
        ALONE,
    ),
    "the wave runs the other way": Mutation(
        "poprisk_lab/tasks/convection.py",
        "return (points[:, 0] - SPEED * points[:, 1]).sin()",
        "return (points[:, 0] + SPEED * points[:, 1]).sin()",
        SOLUTION,
    ),
    "tested on the noise": Mutation(
        "poprisk_lab/tasks/image.py",
        "test=(where, clean)",
        "test=(where, noisy)",
        CLEAN,
    ),
    "pixels column by column": Mutation(
        "poprisk_lab/tasks/image.py",
        "return torch.cartesian_prod(axis, axis)",
        "return torch.cartesian_prod(axis, axis).flip(1)",
        PLACES,
    ),
    "frequency left out of the start": Mutation(
        "poprisk_lab/tasks/image.py",
        "bound = math.sqrt(6 / sizes[i]) / OMEGA if i else 1 / sizes[0]",
        "bound = math.sqrt(6 / sizes[i]) if i else 1 / sizes[0]",
        SPREAD,
    ),
    "losses averaged over networks": Mutation(
        "poprisk_lab/tasks/convection.py",
        "return (values - y).square().mean(1).sum(), residuals.square().mean(1).sum()",
        "return (values - y).square().mean(), residuals.square().mean()",
        LOSS,
    ),
    "measurements drawn with replacement": Mutation(
        "poprisk_lab/tasks/convection.py",
        "torch.randperm(n, generator=g)",
        "torch.randint(n, (n,), generator=g)",
        EPOCH,
    ),
    "goal missed by a strict comparison": Mutation(
        "poprisk_lab/studies/optimizers.py",
        "if e <= goal",
        "if e < goal",
        KEPT,
    ),
    "speed-up upside down": Mutation(
        "poprisk_lab/studies/optimizers.py",
        "return speed_up(than.steps, self.steps)",
        "return speed_up(self.steps, than.steps)",
        FASTER,
    ),
    "worse AdamW compared with": Mutation(
        "poprisk_lab/studies/optimizers.py",
        "return min(of_arm(among, *arms), key=lambda c: c.slowness)",
        "return max(of_arm(among, *arms), key=lambda c: c.slowness)",
        FASTER,
    ),
    "error as a share of its own": Mutation(
        "poprisk_lab/studies/pinn/__init__.py",
        "share(best, adamw)",
        "share(best, best)",
        "test_claim_pinn.py::test_the_end_is_asked_by_us_and_does_not_decide",
    ),
    "no worse than AdamW at any rate": Mutation(
        "poprisk_lab/studies/pinn/__init__.py",
        'of_arm(among, "adamw", lr=own.lr)',
        'of_arm(among, "adamw")[:1]',
        "test_claim_pinn.py::test_no_worse_is_asked_at_the_same_learning_rate_and_noise",
    ),
    "rate of ours chosen on the seeds that are judged": Mutation(
        "poprisk_lab/studies/pinn/__init__.py",
        "return min(of_arm(among, arm), key=lambda c: abs(c.lr - PILOT_RATE))",
        "return least(among, arm)",
        "test_claim_pinn.py::test_the_rate_of_ours_is_that_of_the_pilot_whatever_the_runs_say",
    ),
    "points inside taken for measurements": Mutation(
        "poprisk_lab/studies/pinn/runs.py",
        '"measured": task.POINTS, "inside": None',
        '"measured": task.POINTS, "inside": task.POINTS',
        "test_claim_pinn.py::test_the_optimizer_is_told_which_loss_comes_again",
    ),
    "gap to AdamW reversed": Mutation(
        "poprisk_lab/studies/image.py",
        'return difference(a.values("final"), b.values("final"))',
        'return difference(b.values("final"), a.values("final"))',
        STAYS,
    ),
    "loss from the best moment unbounded": Mutation(
        "poprisk_lab/studies/image.py",
        'one.paper.runs.mean("lost"), LOST_AT_MOST)',
        'one.paper.runs.mean("lost"), 100 * LOST_AT_MOST)',
        FITS_NOISE,
    ),
    "AdamW in hindsight chosen by its end": Mutation(
        "poprisk_lab/studies/image.py",
        'most(one.all, "adamw", key="best")',
        'most(one.all, "adamw")',
        HINDSIGHT,
    ),
    "decibels of the root": Mutation(
        "poprisk_lab/tasks/image.py",
        "-10 * math.log10(",
        "-20 * math.log10(",
        DECIBELS,
    ),
    "update sizes of the control not those of the arm": Mutation(
        "poprisk_lab/studies/optimizers.py",
        "runs = train(arm, None, trace.record_step)",
        'runs = train("adamw", None, trace.record_step)',
        AS_FAR,
    ),
    "controls counted as the arm": Mutation(
        "poprisk_lab/studies/optimizers.py",
        '("matched", arm, rate, decay)',
        '(arm, "", rate, decay)',
        GROUPED,
    ),
    "soft mask in every shuffled arm": Mutation(
        "poprisk_lab/arms.py",
        'ShuffledMask(settings.get("mask", "soft"))',
        'ShuffledMask("soft")',
        SHUFFLED,
    ),
}
