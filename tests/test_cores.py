import os

import pytest

from ddpm_faces.training import cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "max 100000"}, None),
        ({"pod/cpu.max": "400000 100000", "cpu.max": "100000 100000"}, 1),  # a parent's limit applies too
        ({"pod/cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),  # version 1
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_limit_of_a_container(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    group = tmp_path / "own"
    group.write_text("0::/pod\n" if any("pod" in name for name in files) else "0::/\n")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_GROUP", group)
    assert cores.cgroup_limit() == expected


def test_cores_are_the_minimum_of_affinity_and_limit(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for limit, expected in ((None, 8), (3, 3), (16, 8)):
        monkeypatch.setattr(cores, "cgroup_limit", lambda limit=limit: limit)
        assert cores.available_cores() == expected
