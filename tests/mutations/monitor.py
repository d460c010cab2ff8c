"""Plausible bugs of the monitor's alerts, sinks and savings."""

from mutations import Mutation

ALERTS, SIGNAL = "poprisk/monitor/alerts.py", "poprisk/monitor/signal.py"
AGAIN = "test_alerts.py::test_starvation_begins_after_its_rows_and_again_after_its_end"
WRITTEN = "test_alerts.py::test_alerts_are_kept_logged_and_written"
CHANCE = "test_alerts.py::test_the_false_alarms_of_drift_are_those_of_chance"
BY_HEART = "test_alerts.py::test_a_risk_that_rises_while_the_training_loss_falls_is_memorization"
PLANTED = "test_alerts.py::test_canaries_are_memorized_above_the_limit_and_above_their_errors"
RESUMED = "test_alerts.py::test_a_resumed_run_does_not_say_it_again"
ONCE = "test_alerts.py::test_a_row_of_which_more_is_seen_later_counts_once"
ANOTHER = "test_alerts.py::test_rows_of_another_run_do_not_count"
KNOWN = "test_signal.py::test_a_known_share_is_found_within_its_errors"
TRACKIO = "test_alerts.py::test_trackio_gets_rows_and_alerts"
WHOLE = "test_signal.py::test_a_signal_without_modules_is_that_of_all"
LOSS = "test_monitor.py::test_a_loss_alone_takes_no_gradients"
SEVERAL = "test_monitor.py::test_numbers_are_those_of_all_parts_of_the_step"

MUTATIONS = {
    "starvation ends where it began": Mutation(
        ALERTS, "min(ratios) >= 2 * self.below", "min(ratios) >= self.below", AGAIN
    ),
    "what is in between ends an alert": Mutation(
        ALERTS, "elif holds is False:", "elif not holds:", WRITTEN
    ),
    "an alert is never over": Mutation(ALERTS, "now.discard(place)", "pass", WRITTEN),
    "one row that is not above is drift, too": Mutation(
        ALERTS, "_between(above == self.rows,", "_between(above >= self.rows - 1,", CHANCE
    ),
    "a risk that rises without fitting is memorization": Mutation(
        ALERTS, "_between(above and fitted,", "_between(above,", BY_HEART
    ),
    "a risk is compared with the error of one of two": Mutation(
        ALERTS,
        'math.hypot(row["risk/error"], best["risk/error"])',
        'row["risk/error"]',
        BY_HEART,
    ),
    "canaries without their errors": Mutation(ALERTS, "v - 3 * e for", "v - 0 * e for", PLANTED),
    "a resumed run begins without alerts": Mutation(
        ALERTS, "self.holding[name] = set(state.get(name, ()))", "pass", RESUMED
    ),
    "rows of the run before count": Mutation(ALERTS, "self._rows.clear()", "pass", ANOTHER),
    "parts of a step are rows": Mutation(ALERTS, "self._rows.pop()", "pass", ONCE),
    "few steps have normal intervals": Mutation(
        SIGNAL, "else _student(len(steps) - 1)", "else INTERVAL", KNOWN
    ),
    "trackio is told a level in words": Mutation(
        "poprisk/monitor/sinks.py",
        'importlib.import_module("trackio").AlertLevel.WARN',
        '"warn"',
        TRACKIO,
    ),
    "without modules the last one is the whole": Mutation(
        "poprisk/monitor/statistics.py",
        "whole = grams.double() if whole is None else whole + grams",
        "whole = grams.double()",
        WHOLE,
    ),
    "a loss takes gradients along": Mutation(
        "poprisk/monitor/__init__.py",
        "if q.gradients and not isinstance(q, Loss)]",
        "if q.gradients]",
        LOSS,
    ),
    "the sum of gradients is that of the last part": Mutation(
        "poprisk/monitor/statistics.py",
        "self.sums[name] + value if name in self.sums else value",
        "value",
        SEVERAL,
    ),
}
