import sys

from mlx_tune.diagnosis import check, doctor


def test_the_child_runs_as_a_module():
    by_name = {one.name: one for one in check.all_checks()}
    found = doctor.run_in_child(by_name["python"], python=sys.executable)
    assert (found.name, found.status) == ("python", "pass")
