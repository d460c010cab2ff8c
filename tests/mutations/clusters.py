"""Faults of a comparison in parts, and of places that are not this machine."""

from mutations import Mutation

CLUSTERS, RUNNER = "poprisk_lab/clusters.py", "poprisk_lab/runner.py"
SHARED = "test_clusters.py::test_shards_share_all_trials_and_none_waits_for_another"
GOES_ON = "test_clusters.py::test_the_others_go_on_when_one_fails_but_not_those_after_it"

MUTATIONS = {
    "trainings dealt without those that they follow": Mutation(
        "poprisk_lab/study.py",
        "for chain in chains(trials):\n        min(",
        "for chain in ((trial,) for trial in trials):\n        min(",
        SHARED,
    ),
    "all shards but the first empty": Mutation(
        "poprisk_lab/study.py", "min(found, key=len)", "max(found, key=len)", SHARED
    ),
    "one failure ends all": Mutation(
        RUNNER, "elif not pool.patient:", "elif pool.patient:", GOES_ON
    ),
    "what follows a failure begun": Mutation(
        RUNNER,
        "                errors.append(error)",
        "                errors.append(error)\n                undone -= names",
        GOES_ON,
    ),
    "a share that stops at its first failure": Mutation(
        CLUSTERS,
        "for chain in chains(share):",
        "for chain in [share]:",
        "test_clusters.py::test_a_share_goes_on_with_what_does_not_come_after_a_failure",
    ),
    "jobs that are under way submitted again": Mutation(
        RUNNER,
        "for trial in waiting if trial.name not in taken]",
        "for trial in waiting]",
        "test_clusters.py::test_what_is_under_way_there_is_followed_and_not_begun_again",
    ),
    "any code for the same": Mutation(
        CLUSTERS,
        "        _check_environment(made_with)\n",
        "",
        "test_clusters.py::test_a_machine_with_other_code_is_refused_before_it_trains",
    ),
    "a directory that another makes taken for a stranger's": Mutation(
        "poprisk_lab/store.py",
        "elif not blank:",
        "elif self.path.exists() and not self._is_blank():",
        "test_rundir.py::test_a_directory_that_another_process_makes_at_this_moment_is_taken",
    ),
}
