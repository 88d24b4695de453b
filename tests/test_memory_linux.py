"""Linux's memory files, from recorded trees: cgroups of both versions, containers, pressure, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from loadbench.target.memory_figures import AbsentError
from loadbench.target.memory_gpu import held_by, read_amd
from loadbench.target.memory_linux import (
    find_cgroup,
    read_pressure,
    read_processes,
    read_shares,
    reset_peaks,
)

PID = 4242
MIB = 1 << 20
PSI = "some avg10=1.50 avg60=0.40 avg300=0.10 total=123\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=45\n"


def lay(root: Path, files: Mapping[str, str | int]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n" if isinstance(text, int) else text)


def machine(root: Path, cgroup: str, *mounts: str) -> Path:
    """A /proc with the process's cgroup file and the mounts, which name ROOT for the tree's own folder."""
    lines = [line.replace("ROOT", str(root)) + "\n" for line in mounts]
    lay(
        root / "proc",
        {f"{PID}/cgroup": cgroup, "self/mountinfo": "23 1 8:1 / / rw - ext4 /dev/vda rw\n" + "".join(lines)},
    )
    return root / "proc"


V2 = "30 23 0:26 / ROOT/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 / ROOT/memory rw,relatime - cgroup cgroup rw,memory"


def v2_files(folder: str, **other: str | int) -> dict[str, str | int]:
    files: dict[str, str | int] = {
        "memory.current": 300 * MIB,
        "memory.peak": 400 * MIB,
        "memory.max": "max\n",
        "memory.swap.current": 5 * MIB,
        "memory.events": "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n",
        "memory.pressure": PSI,
    }
    return {f"{folder}/{name}": text for name, text in (files | other).items()}


def test_v2_gives_current_peak_swap_and_counts_and_the_smallest_limit_on_the_way_up(tmp_path: Path) -> None:
    lay(tmp_path / "cgroup", v2_files("user.slice/app.scope/inner"))
    lay(
        tmp_path / "cgroup",
        {"user.slice/app.scope/memory.max": 4096 * MIB, "user.slice/memory.max": 2048 * MIB, "memory.stat": ""},
    )
    proc = machine(tmp_path, "0::/user.slice/app.scope/inner\n", V2)
    assert find_cgroup(proc, PID).read() == {
        "cgroup_current_bytes": 300 * MIB,
        "cgroup_peak_bytes": 400 * MIB,
        "cgroup_limit_bytes": 2048 * MIB,
        "cgroup_swap_bytes": 5 * MIB,
        "cgroup_ooms": 3,
        "cgroup_oom_kills": 2,
    }


def test_without_a_limit_anywhere_there_is_none_and_an_old_kernel_gives_no_peak(tmp_path: Path) -> None:
    lay(tmp_path / "cgroup", v2_files("a"))
    (tmp_path / "cgroup/a/memory.peak").unlink()
    figures = find_cgroup(machine(tmp_path, "0::/a\n", V2), PID).read()
    assert figures["cgroup_limit_bytes"] is None and figures["cgroup_peak_bytes"] is None


def test_a_container_sees_its_own_cgroup_as_the_root_and_that_has_figures(tmp_path: Path) -> None:
    lay(tmp_path / "cgroup", v2_files(".", **{"memory.max": 1024 * MIB}))
    assert find_cgroup(machine(tmp_path, "0::/\n", V2), PID).read()["cgroup_limit_bytes"] == 1024 * MIB


def test_a_mount_of_a_part_of_the_hierarchy_is_entered_at_that_part(tmp_path: Path) -> None:
    lay(tmp_path / "memory", {"memory.usage_in_bytes": 7 * MIB, "memory.limit_in_bytes": 64 * MIB})
    inside = V1.replace("0:32 / ", "0:32 /docker/abc ")
    proc = machine(tmp_path, "4:memory:/docker/abc\n", inside)
    figures = find_cgroup(proc, PID).read()
    assert (figures["cgroup_current_bytes"], figures["cgroup_limit_bytes"]) == (7 * MIB, 64 * MIB)
    (proc / str(PID) / "cgroup").write_text("4:memory:/docker/other\n")
    with pytest.raises(AbsentError, match="/docker/other of the target is not mounted here"):
        find_cgroup(proc, PID)


def test_v1_subtracts_for_swap_counts_kills_and_takes_its_huge_number_for_no_limit(tmp_path: Path) -> None:
    lay(
        tmp_path / "memory",
        {
            "model/memory.usage_in_bytes": 100 * MIB,
            "model/memory.memsw.usage_in_bytes": 130 * MIB,
            "model/memory.max_usage_in_bytes": 150 * MIB,
            "model/memory.limit_in_bytes": 9223372036854771712,
            "model/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
            "memory.limit_in_bytes": 9223372036854771712,
        },
    )
    hybrid = "9:name=systemd:/x\n4:memory:/model\n0::/elsewhere\n"  # v2 is mounted too, without the controller
    assert find_cgroup(machine(tmp_path, hybrid, V2, V1), PID).read() == {
        "cgroup_current_bytes": 100 * MIB,
        "cgroup_peak_bytes": 150 * MIB,
        "cgroup_limit_bytes": None,
        "cgroup_swap_bytes": 30 * MIB,
        "cgroup_oom_kills": 4,
    }


@pytest.mark.parametrize(
    ("cgroup", "mount", "reason"),
    [
        ("0::/\n", V2, "root cgroup, which has no figures"),
        ("0::/a\n", V2, "does not account for memory"),
        ("0::/../other\n", V2, "lies outside"),
        ("4:memory:/\n", V1, "root cgroup, whose figures are the machine's"),
        ("4:cpu:/\n", V1, "accounts for no memory"),
        ("0::/a\n", V1, "/a of the target is not mounted"),
    ],
)
def test_a_process_without_a_cgroup_of_its_own_has_a_reason(
    tmp_path: Path, cgroup: str, mount: str, reason: str
) -> None:
    lay(tmp_path, {"memory/memory.usage_in_bytes": 5, "memory/memory.limit_in_bytes": 9223372036854771712})
    with pytest.raises(AbsentError, match=reason):
        find_cgroup(machine(tmp_path, cgroup, mount), PID)


def test_a_process_that_is_not_there_has_no_cgroup(tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match="cgroup of process 4243 may not be read: No such file"):
        find_cgroup(machine(tmp_path, "0::/\n", V2), PID + 1)


def test_a_cgroup_is_read_when_its_process_is_gone_and_said_to_be_gone_itself(tmp_path: Path) -> None:
    lay(tmp_path / "cgroup", v2_files("a"))
    proc = machine(tmp_path, "0::/a\n", V2)
    cgroup = find_cgroup(proc, PID)
    (proc / str(PID) / "cgroup").unlink()
    assert cgroup.read()["cgroup_oom_kills"] == 2
    for file in (tmp_path / "cgroup/a").iterdir():
        file.unlink()
    (tmp_path / "cgroup/a").rmdir()
    with pytest.raises(AbsentError, match="cgroup is gone"):
        cgroup.read()


def test_a_mount_point_with_a_space_is_found(tmp_path: Path) -> None:
    root = tmp_path / "a b"
    lay(root / "cgroup", v2_files("x"))
    proc = machine(root, "0::/x\n", V2.replace("ROOT", str(root).replace(" ", r"\040")))
    assert find_cgroup(proc, PID).path == root / "cgroup/x"


def test_pressure_is_the_cgroups_where_it_has_one_else_the_machines_else_absent(tmp_path: Path) -> None:
    lay(tmp_path / "cgroup", v2_files("a"))
    proc = machine(tmp_path, "0::/a\n", V2)
    lay(proc, {"pressure/memory": PSI.replace("1.50", "80.00")})
    cgroup = find_cgroup(proc, PID)
    expected = {"pressure_some_share": 0.015, "pressure_full_share": 0.0025, "pressure_scope": "cgroup"}
    assert read_pressure(proc, cgroup) == expected
    (cgroup.path / "memory.pressure").unlink()
    found = read_pressure(proc, cgroup)
    assert (found["pressure_some_share"], found["pressure_scope"]) == (0.8, "machine")
    assert read_pressure(proc, None) == found
    (proc / "pressure/memory").unlink()
    with pytest.raises(AbsentError, match="no pressure stall information"):
        read_pressure(proc, cgroup)


STATUS = "Name:\tx\nVmHWM:\t   30 kB\nVmRSS:\t   20 kB\nVmSwap:\t    1 kB\n"
ZOMBIE = "Name:\tx\nState:\tZ (zombie)\nThreads:\t1\n"


def test_the_tree_is_summed_a_zombie_of_it_left_out_and_a_zombie_root_has_ended(tmp_path: Path) -> None:
    lay(tmp_path, {"1/status": STATUS, "2/status": STATUS, "3/status": ZOMBIE})
    assert read_processes(tmp_path, [1, 2, 3, 4]) == {
        "processes": 2,
        "rss_bytes": 40 << 10,
        "swap_bytes": 2 << 10,
        "peak_rss_bytes": 60 << 10,
    }
    for pids in ([3, 1], [4, 1], []):
        with pytest.raises(AbsentError, match="the process has ended"):
            read_processes(tmp_path, pids)


def test_shares_of_a_process_that_just_ended_are_left_out_and_of_an_old_kernel_absent(tmp_path: Path) -> None:
    rollup = "55c4-7ffd ---p 00000000 00:00 0 [rollup]\nPss:  7 kB\nPrivate_Clean:  2 kB\nPrivate_Dirty:  3 kB\n"
    lay(tmp_path, {"1/smaps_rollup": rollup, "2/status": STATUS})
    assert read_shares(tmp_path, [1, 9]) == {"pss_bytes": 7 << 10, "uss_bytes": 5 << 10}
    with pytest.raises(AbsentError, match="no smaps_rollup"):
        read_shares(tmp_path, [1, 2])
    with pytest.raises(AbsentError, match="has ended"):
        read_shares(tmp_path, [9])


def test_peaks_are_set_back_with_a_five_and_a_process_that_ended_does_not_hinder(tmp_path: Path) -> None:
    lay(tmp_path, {"1/clear_refs": "", "2/clear_refs": ""})
    reset_peaks(tmp_path, [1, 9, 2])
    assert [(tmp_path / pid / "clear_refs").read_text() for pid in "12"] == ["5", "5"]


def test_amds_cards_are_read_from_their_files_and_a_missing_sensor_is_none(tmp_path: Path) -> None:
    lay(
        tmp_path,
        {
            "card1/device/mem_info_vram_total": 17163091968,
            "card1/device/mem_info_vram_used": 9876543210,
            "card1/device/mem_info_gtt_used": 22020096,
            "card1/device/gpu_busy_percent": 87,
            "card1/device/hwmon/hwmon3/power1_average": 203000000,
            "card1/device/hwmon/hwmon3/temp1_input": 64000,
            "card1/device/hwmon/hwmon3/freq1_input": 2105000000,
            "card0/device/mem_info_vram_total": 536870912,
            "card0/device/mem_info_vram_used": 100,
            "card1-DP-1/status": "connected\n",
            "card2/device/vendor": "0x8086\n",
        },
    )
    small, large = read_amd(tmp_path)
    assert (small.index, small.power_w, small.utilisation_share) == (0, None, None)
    assert (large.index, large.name, large.used_bytes, large.total_bytes) == (1, "AMD card1", 9876543210, 17163091968)
    assert (large.shared_bytes, large.utilisation_share, large.power_w) == (22020096, 0.87, 203.0)
    assert (large.temperature_c, large.clock_mhz, large.process_bytes) == (64.0, 2105.0, None)


def test_a_machine_without_amds_driver_says_so(tmp_path: Path) -> None:
    lay(tmp_path, {"card0/device/vendor": "0x8086\n"})
    with pytest.raises(AbsentError, match="no card of the amdgpu driver"):
        read_amd(tmp_path)


def test_a_device_counts_a_process_once_and_says_nothing_of_those_it_does_not_list() -> None:
    users = [(1, 100), (1, 120), (2, 50), (3, None), (9, 999)]
    assert held_by({1, 2, 3}, users) == 170
    assert held_by({3}, users) is None
    assert held_by({4}, users) is None
