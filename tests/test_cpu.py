"""How many cores a process may use, in containers as they describe themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from epmq_deploy.cpu import cpu_quota, physical_cores, usable_cores


def described(folder: Path, groups: str, mounts: list[tuple[str, str, str]]) -> Path:
    """A process's description of itself; mounts are root, folder and type with options."""
    process = folder / "self"
    process.mkdir()
    (process / "cgroup").write_text(groups)
    lines = [
        f"{index} 25 0:{index} {root} {folder / where} rw,nosuid - {kind}\n"
        for index, (root, where, kind) in enumerate(mounts)
    ]
    (process / "mountinfo").write_text("22 1 0:2 / / rw - ext4 /dev/sda rw\n" + "".join(lines))
    return process


def write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


V2 = [("/", "cgroup", "cgroup2 cgroup2 rw")]
V1 = [("/", "cgroup/cpu", "cgroup cgroup rw,cpu,cpuacct"), ("/", "memory", "cgroup c rw,memory")]


@pytest.mark.parametrize(
    ("limit", "quota"), [("max 100000", None), ("50000 100000", 0.5), ("250000 100000", 2.5)]
)
def test_quotas_of_version_2(tmp_path: Path, limit: str, quota: float | None) -> None:
    write(tmp_path / "cgroup/cpu.max", f"{limit}\n")
    assert cpu_quota(described(tmp_path, "0::/\n", V2)) == quota


def test_the_smallest_quota_of_nested_groups_counts(tmp_path: Path) -> None:
    write(tmp_path / "cgroup/pods/cpu.max", "150000 100000\n")
    write(tmp_path / "cgroup/pods/one/cpu.max", "400000 100000\n")
    write(tmp_path / "cgroup/pods/one/inner/cpu.max", "max 100000\n")
    assert cpu_quota(described(tmp_path, "0::/pods/one/inner\n", V2)) == 1.5


@pytest.mark.parametrize(("limit", "quota"), [("-1", None), ("150000", 1.5)])
def test_quotas_of_version_1(tmp_path: Path, limit: str, quota: float | None) -> None:
    write(tmp_path / "cgroup/cpu/docker/abc/cpu.cfs_quota_us", f"{limit}\n")
    write(tmp_path / "cgroup/cpu/docker/abc/cpu.cfs_period_us", "100000\n")
    groups = "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"
    assert cpu_quota(described(tmp_path, groups, V1)) == quota


def test_a_container_of_version_1_sees_its_own_group_at_the_mount(tmp_path: Path) -> None:
    write(tmp_path / "cgroup/cpu/cpu.cfs_quota_us", "200000\n")
    write(tmp_path / "cgroup/cpu/cpu.cfs_period_us", "100000\n")
    mounts = [("/docker/abc", "cgroup/cpu", "cgroup cgroup rw,cpuacct,cpu")]
    assert cpu_quota(described(tmp_path, "3:cpu,cpuacct:/docker/abc\n", mounts)) == 2


def test_both_versions_at_once(tmp_path: Path) -> None:
    write(tmp_path / "cgroup/cpu/cpu.cfs_quota_us", "300000\n")
    write(tmp_path / "cgroup/cpu/cpu.cfs_period_us", "100000\n")
    mounts = [*V1, ("/", "unified", "cgroup2 cgroup2 rw")]
    assert cpu_quota(described(tmp_path, "1:cpu:/\n0::/\n", mounts)) == 3


@pytest.mark.parametrize("groups", ["", "nonsense\n", "0::/\n"])
def test_without_a_description_there_is_no_quota(tmp_path: Path, groups: str) -> None:
    assert cpu_quota(described(tmp_path, groups, V2)) is None
    assert cpu_quota(tmp_path / "missing") is None


def test_processors_of_one_core_count_once(tmp_path: Path) -> None:
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(tmp_path / f"cpu{number}/topology/thread_siblings_list", f"{siblings}\n")
    assert physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert physical_cores({0, 2}, tmp_path) == 1
    # Those that are not described count as cores.
    assert physical_cores({7, 8}, tmp_path) == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone has affinities")
def test_a_process_uses_what_its_affinity_allows() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from epmq_deploy.cpu import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    cores = usable_cores()
    assert cores is not None
    assert 1 <= cores <= len(os.sched_getaffinity(0))


def test_a_quota_below_one_processor_leaves_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epmq_deploy.cpu.cpu_quota", lambda: 0.25)
    assert usable_cores() in (1, None)
    monkeypatch.setattr("epmq_deploy.cpu.cpu_quota", lambda: 1.9)
    assert usable_cores() in (1, None)
