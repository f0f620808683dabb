"""cxr/machine.py: in a container, its limits count, not those of the machine."""

import os

import pytest
import torch
from faults import put
from helpers import extract

import common
from cxr import machine

GIB = 2**30


@pytest.fixture
def simulate_cgroup(monkeypatch, tmp_path):
    """simulate_cgroup(lines, {file: text}): as if /proc/self/cgroup and /sys/fs/cgroup had these.

    The machine then has 64 cores and 256 GiB.
    """

    def simulate(lines, files):
        for name, text in files.items():
            put(tmp_path / "cgroup" / name, text.encode())
        put(tmp_path / "own", lines.encode())
        monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
        pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * 2**20}
        monkeypatch.setattr(os, "sysconf", pages.get)

    return simulate


VERSION_1 = "9:name=systemd:/\n4:memory:/lab/job\n2:cpu,cpuacct:/lab/job\n"
V1_FILES = {
    "cpu/lab/job/cpu.cfs_quota_us": "150000\n",
    "cpu/lab/job/cpu.cfs_period_us": "100000\n",
    "memory/lab/job/memory.limit_in_bytes": f"{4 * GIB}\n",
}


@pytest.mark.parametrize(
    ("lines", "files", "cores", "memory"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n", "memory.max": f"{8 * GIB}\n"}, 2, 8 * GIB),
        ("0::/\n", {"cpu.max": "50000 100000\n", "memory.max": "max\n"}, 1, 256 * GIB),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64, 256 * GIB),
        # The limit of a cgroup above counts as well.
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3, 256 * GIB),
        (VERSION_1, V1_FILES, 2, 4 * GIB),
        # Inside a container, the path is that on the machine, and the files lie at the top.
        (VERSION_1, {"memory/memory.limit_in_bytes": f"{GIB}\n"}, 64, GIB),
        (VERSION_1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64, 2**38),
        ("", {}, 64, 256 * GIB),
    ],
)
def test_the_limits_of_the_cgroup_count(simulate_cgroup, lines, files, cores, memory):
    simulate_cgroup(lines, files)
    assert machine.count_cores() == cores
    assert machine.count_memory() == memory


def test_where_there_are_no_cgroups_the_machine_counts(simulate_cgroup, monkeypatch, tmp_path):
    simulate_cgroup("", {})
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "absent")
    assert (machine.count_cores(), machine.count_memory()) == (64, 256 * GIB)


def test_torch_uses_no_more_threads_than_the_cgroup_has_cores(simulate_cgroup):
    simulate_cgroup("0::/\n", {"cpu.max": "100000 100000\n"})
    before = torch.get_num_threads()
    try:
        common.pick_device("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_features_of_more_than_a_quarter_of_the_memory_are_in_a_file_that_is_gone_afterwards(
    backbone, images, simulate_cgroup, tmp_path, capsys
):
    expected, *_ = extract(backbone, images, 2)
    n_bytes = expected.nbytes  # 12 images of 2 views of 8 features
    for limit, is_mapped in ((4 * n_bytes, False), (4 * n_bytes - 1, True)):
        simulate_cgroup("0::/\n", {"memory.max": f"{limit}\n"})
        features, *_ = extract(backbone, images, 2, tmp_path / "cache", no_cache=True)
        assert torch.equal(features, expected)
        assert ("in a temporary file" in capsys.readouterr().out) == is_mapped
        assert not list(tmp_path.glob("cache/*"))


def test_the_model_from_mapped_features_is_the_same(run_train, simulate_cgroup, tmp_path, capsys):
    models = set()
    for limit in ("max", "1000"):
        simulate_cgroup("0::/\n", {"memory.max": limit})
        assert run_train("--epochs", 3) == 0
        models.add((tmp_path / "model.pth").read_bytes())
    assert "in a temporary file" in capsys.readouterr().out and len(models) == 1
