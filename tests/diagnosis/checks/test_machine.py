import pytest

from mlx_tune.devices import cgroup_memory
from mlx_tune.diagnosis.checks import machine
from mlx_tune.diagnosis.checks.readings import Neighbour

GB = 10**9


@pytest.mark.parametrize(("available", "status"), [(8 * GB, "pass"), (GB, "warn"), (GB // 2, "warn")])
def test_memory(available, status):
    result = machine.memory.run(total=16 * GB, available=available)
    assert result.status == status
    assert result.figures == {"total_bytes": 16 * GB, "available_bytes": available}


@pytest.mark.parametrize(
    ("used", "pressure", "status", "words"),
    [
        (0, None, "pass", "0 B of swap"),
        (5 * GB, None, "warn", "5.00 GB of swap"),
        (GB, 1, "pass", "memory pressure normal"),
        (GB, 2, "warn", "memory pressure warning"),
        (GB, 4, "warn", "memory pressure critical"),
    ],
)
def test_swap(used, pressure, status, words):
    result = machine.swap.run(used=used, total=16 * GB, pressure=pressure)
    assert result.status == status
    assert words in result.summary


def plant_cgroup(tmp_path, limit):
    group = tmp_path / "cgroup" / "job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{GB}\n")
    (group / "memory.stat").write_text("inactive_file 0\n")
    own = tmp_path / "own"
    own.write_text("0::/job\n")
    return cgroup_memory(tmp_path / "cgroup", own)


def test_a_container_that_may_hold_less_than_mlx_thinks_warns(tmp_path):
    result = machine.container.run(groups=plant_cgroup(tmp_path, 4 * GB), host=64 * GB)
    assert result.status == "warn"
    assert "the container may hold 4.00 GB, 3.00 GB of it are free" in result.summary
    assert 'mt.memory_limit("3.60GB")' in result.fix


def test_a_container_as_large_as_the_host_passes(tmp_path):
    assert machine.container.run(groups=plant_cgroup(tmp_path, 60 * GB), host=64 * GB).status == "pass"


def test_no_container_is_skipped(tmp_path):
    assert machine.container.run(groups=plant_cgroup(tmp_path, "max"), host=64 * GB).status == "skip"


@pytest.mark.parametrize(("megabytes", "status"), [(None, "pass"), (0, "pass"), (48_000, "pass"), (62_000, "warn")])
def test_a_wired_limit_that_starves_the_system_warns(megabytes, status):
    result = machine.working_set.run(recommended=48 * 2**30, wired_limit_mb=megabytes, ram=64 * 2**30)
    assert result.status == status
    if status == "warn":
        assert "sudo sysctl iogpu.wired_limit_mb=49152" in result.fix


def test_the_working_set_of_a_stand_in_for_metal(metal):
    result = machine.working_set.run()
    assert result.status == "pass"
    assert "Metal recommends at most 51.5 GB of 68.7 GB" in result.summary


def test_processes_that_hold_much_are_named():
    held = [Neighbour(12, "python3", 9 * GB), Neighbour(13, "browser", GB)]
    result = machine.processes.run(neighbours=held, total=32 * GB)
    assert result.status == "warn"
    assert "python3 (12) 9.00 GB" in result.summary
    assert "browser" not in result.summary


def test_a_process_on_the_gpu_is_named():
    result = machine.processes.run(neighbours=[Neighbour(7, "server", GB, on_gpu=True)], total=32 * GB)
    assert result.status == "warn"
    assert "server (7) 1.00 GB on the GPU" in result.summary


def test_small_processes_are_no_matter():
    assert machine.processes.run(neighbours=[Neighbour(7, "x", GB)], total=32 * GB).status == "pass"


@pytest.mark.parametrize(("free", "status"), [(50 * GB, "pass"), (5 * GB, "warn"), (GB // 2, "fail")])
def test_disk(free, status):
    result = machine.disk.run(free={"models": free, "this folder": 100 * GB})
    assert result.status == status
    assert "free for models" in result.summary


def test_the_disks_of_this_machine_are_found_even_without_a_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there"))
    assert set(machine.disk.run().figures["free_bytes"]) == {"this folder", "temporary files", "models"}


def test_variables_that_change_memory_behaviour_are_named():
    result = machine.environment.run(variables={"MLX_MAX_OPS_PER_BUFFER": "1", "HOME": "/home/ann"})
    assert result.status == "warn"
    assert "MLX_MAX_OPS_PER_BUFFER=1" in result.summary
    assert "HOME" not in result.summary
    assert result.fix.startswith("unset MLX_MAX_OPS_PER_BUFFER")


def test_other_variables_pass():
    assert machine.environment.run(variables={"PATH": "/bin"}).status == "pass"
