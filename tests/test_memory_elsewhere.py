"""Windows' and macOS's memory figures, as far as another system can check them: what is made of what they say."""

from __future__ import annotations

import ctypes

import pytest

from loadbench.target.memory_figures import AbsentError
from loadbench.target.memory_macos import RusageInfo, level_name
from loadbench.target.memory_windows import GpuCounters, gpu_figures, read_commit

CARD, OTHER = "luid_0x00000000_0x0000C85A_phys_0", "luid_0x00000000_0x0000E1F3_phys_0"
# Written by hand in the instance names that the counters have; not taken from a machine.
COUNTERS = {
    "process_dedicated": [
        (f"pid_8268_{CARD}", 4_718_592_000),
        (f"pid_500_{CARD}", 1_048_576),
        (f"pid_1432_{CARD}", 305_135_616),
    ],
    "process_shared": [
        (f"pid_8268_{CARD}", 717_225_984),
        (f"pid_8268_{OTHER}", 16_777_216),
        (f"pid_1432_{CARD}", 71_303_168),
    ],
    "adapter_dedicated": [(OTHER, 0), (CARD, 5_905_580_032)],
    "adapter_shared": [(OTHER, 16_777_216), (CARD, 788_529_152)],
}


def test_a_process_tree_is_summed_over_its_adapters_and_a_longer_pid_is_another() -> None:
    found = gpu_figures(COUNTERS, {8268, 500})
    assert found["gpu_dedicated_bytes"] == 4_718_592_000 + 1_048_576
    assert found["gpu_shared_bytes"] == 734_003_200
    assert gpu_figures(COUNTERS, {826})["gpu_dedicated_bytes"] is None


def test_adapters_are_devices_with_what_the_process_holds_of_each() -> None:
    first, second = gpu_figures(COUNTERS, {8268})["gpus"]
    assert (first.used_bytes, first.shared_bytes, first.process_bytes) == (5_905_580_032, 788_529_152, 4_718_592_000)
    assert (second.used_bytes, second.shared_bytes, second.process_bytes) == (0, 16_777_216, None)
    assert first.name.startswith("adapter luid_") and (first.index, second.index) == (0, 1)


def test_the_footprint_lies_where_the_header_puts_it() -> None:
    # 16 bytes of uuid and seven words before it, two after it: <sys/resource.h>, rusage_info_v0.
    assert (RusageInfo.ri_phys_footprint.offset, ctypes.sizeof(RusageInfo)) == (72, 96)


def test_pressure_has_the_systems_words_and_an_unknown_number_has_none() -> None:
    assert [level_name(value) for value in (1, 2, 4)] == ["normal", "warn", "critical"]
    with pytest.raises(AbsentError, match="got 3"):
        level_name(3)


@pytest.mark.skipif("sys.platform == 'win32'", reason="there they are")
def test_elsewhere_than_on_windows_its_figures_are_absent() -> None:
    with pytest.raises(AbsentError):
        read_commit()
    with pytest.raises(AbsentError):
        GpuCounters()
