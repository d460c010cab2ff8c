"""Plausible bugs of the audit of labels."""

from mutations import Mutation

NAIVE = "test_audit_scores.py::test_the_noise_aware_score_is_the_naive_one"
PATTERN = "test_audit_scores.py::test_a_pattern_is_found_where_labels_follow_one"
UNMIXED = "test_audit_scores.py::test_noise_that_was_mixed_in_is_removed"
RESIDUALS = "test_audit_scores.py::test_residuals_in_units_of_the_noise"
FOUND = "test_audit_auditor.py::test_wrong_labels_are_found_and_put_right"
CLEAN = "test_audit_auditor.py::test_planted_labels_of_a_clean_set_are_caught"
RIGHT = "test_audit_auditor.py::test_planted_labels_that_are_right_by_chance_are_not_missed_ones"
APART = "test_audit_auditor.py::test_planted_labels_are_not_among_the_suspects"
AVERAGE = "test_audit_auditor.py::test_the_average_weighs_later_looks_more"
BEFORE = "test_audit_auditor.py::test_looks_before_labels_are_memorized_count"
TWO = "test_audit_auditor.py::test_memorization_of_two_classes_is_beyond_that_of_labels_that_stayed"
CANARIES = "test_audit_auditor.py::test_memorization_is_that_of_the_canaries"
OTHERS = "test_audit_auditor.py::test_training_on_other_labels_is_refused"
ENDS = "test_audit_auditor.py::test_a_look_ends_by_itself_when_examples_come_again"
RESUMED = "test_audit_auditor.py::test_a_resumed_run_ends_bit_for_bit_the_same"
MISSING = "test_audit_auditor.py::test_what_has_no_label_is_predicted_and_never_suspect"
PAIRS = "test_audit_auditor.py::test_pairs_whose_first_is_said_to_be_better"
NEWEST = "test_audit_gather.py::test_an_example_that_both_have_seen_has_the_later_as_its_last"
TOGETHER = "test_audit_gather.py::test_parts_put_together_are_the_whole"
FOLDS = "test_audit_trained.py::test_folds_predict_what_they_were_not_trained_on"
PLANTED = (
    "test_audit_trained.py::test_planted_numbers_are_compared_with_their_own_predictions"
    "[dtype0-shape0]"
)
DIGITS = "test_audit_command.py::test_numbers_of_many_digits_are_known_again"
UNLABELLED = "test_audit_trained.py::test_what_has_no_label_is_in_no_training_set_but_is_predicted"
NEXT = "test_audit_result.py::test_what_to_train_on_next"
OWN = "test_audit_command.py::test_predictions_of_a_fold_do_not_depend_on_its_labels"
LATE = "test_audit_command.py::test_the_average_of_a_fold_weighs_later_epochs_more"
MODULES = "test_audit_memorized.py::test_where_memorization_is_quadratic_the_modules_add_up_exactly"
SOME = "test_audit_memorized.py::test_some_items_are_judged_as_among_all"
MATRIX = "test_audit_result.py::test_the_matrix_counts_what_was_put_right"

MUTATIONS = {
    "patterns shrunk where chance does not explain them": Mutation(
        "poprisk/audit/noise.py",
        "alike * even[erring] + (1 - alike)",
        "(1 - alike) * even[erring] + alike",
        PATTERN,
    ),
    "no even spread mixed in": Mutation(
        "poprisk/audit/noise.py",
        "spread = (1 - EVEN) * spread + EVEN * even",
        "pass",
        NAIVE,
    ),
    "rates of classes that differ drawn together": Mutation(
        "poprisk/audit/noise.py",
        "common * pooled + (1 - common)",
        "(1 - common) * pooled + common",
        NAIVE,
    ),
    "a rate of a few errors not drawn to that of all": Mutation(
        "poprisk/audit/noise.py",
        "(wrong + PRIOR) / (all_of + PRIOR / pooled)",
        "(wrong + 1e-9) / (all_of + 1e-6)",
        NAIVE,
    ),
    "noise undone the wrong way round": Mutation(
        "poprisk/audit/noise.py",
        "found * (ratio @ matrix.T)",
        "found * (ratio @ matrix)",
        UNMIXED,
    ),
    "given and true label exchanged in the posterior": Mutation(
        "poprisk/audit/scores.py",
        "np.log(matrix[:, labels].T)",
        "np.log(matrix[labels])",
        NAIVE,
    ),
    "cut at posterior odds of one": Mutation(
        "poprisk/audit/scores.py",
        "threshold=_cut(ordered, suspects),",
        "threshold=0.0,",
        NAIVE,
    ),
    "labels of a clean set would not be caught": Mutation(
        "poprisk/audit/scores.py",
        "return (margin < 0) | (disagree & (margin + self.threshold < self.unsuspected))",
        "return (margin < 0) | (disagree & (margin > np.inf))",
        CLEAN,
    ),
    "a number is judged by its best output": Mutation(
        "poprisk/audit/scores.py",
        "self.residuals(predictions, targets).max(1)",
        "self.residuals(predictions, targets).min(1)",
        RESIDUALS,
    ),
    "all looks weigh the same": Mutation(
        "poprisk/audit/looks.py",
        "self.weight[counted] += share * look.number\n"
        "        step = share * look.number / self.weight[counted]",
        "self.weight[counted] += share\n        step = share / self.weight[counted]",
        AVERAGE,
    ),
    "looks that memorize count": Mutation(
        "poprisk/audit/auditor.py",
        "believed=not memorized",
        "believed=True",
        BEFORE,
    ),
    "looks never end by themselves": Mutation(
        "poprisk/audit/auditor.py",
        "bool(self.predictions.seen[items].any())",
        "not len(items)",
        ENDS,
    ),
    "the present look is not resumed": Mutation(
        "poprisk/audit/looks.py",
        'TENSORS = ("present", ',
        "TENSORS = (",
        RESUMED,
    ),
    "planted labels pass for the given ones": Mutation(
        "poprisk/audit/planted.py",
        "return Labels(items, Planted(canaries, items), items.restored(canaries.targets))",
        "return Labels(\n"
        "        items._replace(labels=canaries.targets),\n"
        "        Planted(canaries, items),\n"
        "        items.restored(canaries.targets),\n"
        "    )",
        APART,
    ),
    "planted labels that changed nothing count as not found": Mutation(
        "poprisk/audit/judge.py",
        "wrong = planted.changed.numpy() & self.seen[index]",
        "wrong = self.seen[index]",
        FOUND,
    ),
    "planted labels that are right by chance count as missed": Mutation(
        "poprisk/audit/judge.py",
        "value=min(1.0, raw.value / cases)",
        "value=min(1.0, raw.value)",
        RIGHT,
    ),
    "two classes not compared with labels that stayed": Mutation(
        "poprisk/audit/planted.py",
        "return own - self._of_those_that_stayed(predictions, seen)[self.original.long()]",
        "return own + 0 * self._of_those_that_stayed(predictions, seen)[self.original.long()]",
        TWO,
    ),
    "the replaced label counts among the other wrong ones": Mutation(
        "poprisk/audit/planted.py",
        "return own - (1 - own - replaced) / (k - 2)",
        "return own - (1 - own) / (k - 1) + 0 * replaced",
        CANARIES,
    ),
    "labels that were not planted may be trained on": Mutation(
        "poprisk/audit/items.py",
        "        self._check_trained(targets, trained[index])\n",
        "",
        OTHERS,
    ),
    "missing labels are suspect": Mutation(
        "poprisk/audit/judge.py",
        "known = (audited.seen & items.labelled).numpy()",
        "known = audited.seen.numpy()",
        MISSING,
    ),
    "pairs in a given order have a pattern": Mutation(
        "poprisk/audit/judge.py",
        'symmetric=items.kind == "preferences"',
        "symmetric=False",
        PAIRS,
    ),
    "the oldest look is the last": Mutation(
        "poprisk/audit/gather.py",
        'newer = part["last_look"] > newest[rows]',
        'newer = part["last_look"] == 1',
        NEWEST,
    ),
    "averages of processes not weighed": Mutation(
        "poprisk/audit/gather.py",
        'average[rows] += part["weight"][:, None] * part["average"].float()\n'
        '        weight[rows] += part["weight"]',
        'average[rows] += part["average"].float()\n        weight[rows] += 1',
        TOGETHER,
    ),
    "folds are trained on what they predict": Mutation(
        "poprisk/audit/trained.py",
        "inside = ((part != k) & labelled)",
        "inside = ((part >= 0) & labelled)",
        FOLDS,
    ),
    "folds are trained on missing labels": Mutation(
        "poprisk/audit/trained.py",
        "inside = ((part != k) & labelled)",
        "inside = (part != k)",
        UNLABELLED,
    ),
    "suspects are kept": Mutation(
        "poprisk/audit/result.py",
        "keep = np.setdiff1d(np.unique(self.example[self.labelled]), bad)",
        "keep = np.unique(self.example[self.labelled])",
        NEXT,
    ),
    "the matrix is turned round": Mutation(
        "poprisk/audit/judge.py",
        "np.add.at(counts, (self.suggested[rows], self.labels[rows]), 1.0)",
        "np.add.at(counts, (self.labels[rows], self.suggested[rows]), 1.0)",
        MATRIX,
    ),
    "a fold of the command line trains on its own labels": Mutation(
        "poprisk_lab/audit/study.py",
        "inside = (items.labelled & ~mine)",
        "inside = items.labelled",
        OWN,
    ),
    "first epochs of a fold weigh as much as the last": Mutation(
        "poprisk_lab/audit/study.py",
        "alpha=2 / (epoch + 2)",
        "alpha=1 / (epoch + 1)",
        LATE,
    ),
    "steps of modules by the gradient before them": Mutation(
        "poprisk_lab/audit/memorized.py",
        "float(((a + b) / 2 * (now - before)).sum())",
        "float((a * (now - before)).sum())",
        MODULES,
    ),
    "planted labels of some items keep their numbers": Mutation(
        "poprisk/audit/planted.py",
        "found.index, found._given = place[self.index[mine]], self._given[rows]",
        "found.index, found._given = self.index[mine] % len(rows), self._given[rows]",
        SOME,
    ),
    "planted numbers are compared with all predictions": Mutation(
        "poprisk/audit/planted.py",
        "self.labels = canaries.targets.cpu()[self.index].reshape(shape)",
        "self.labels = canaries.targets.cpu()[self.index]",
        PLANTED,
    ),
    "given numbers are written with six digits": Mutation(
        "poprisk_lab/audit/command.py",
        '_text(columns["given"][i], exact=True)',
        '_text(columns["given"][i])',
        DIGITS,
    ),
}
