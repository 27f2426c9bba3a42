"""What the benchmark draws, from what a console and the events of a node say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from tests.bench import plot

CONSOLE = """\
[    0.500000] Trying to unpack rootfs image as initramfs...
[    1.250000] Freeing initrd memory: 20548K
[    2.750000] Run /init as init process
"""
EVENTS = """\
{"event":"boot","version":"1","kernel":"6.1"}
{"event":"end","step":"network","stage":"","result":"ok","start_ms":5000,"duration_ms":1000}
{"event":"end","step":"clock","stage":"","result":"ok","start_ms":6100,"duration_ms":100}
{"event":"end","step":"image","stage":"squashfs","result":"ok","start_ms":6300,"duration_ms":2000}
{"event":"end","step":"mount","stage":"squashfs","result":"ok","start_ms":8300,"duration_ms":200}
{"event":"end","step":"overlay","stage":"","result":"ok","start_ms":8500,"duration_ms":300}
{"event":"switch_root","at_ms":9500}
{"event":"cut o"""


def test_the_phases_cover_the_boot_until_switch_root() -> None:
    found = plot.phases(CONSOLE, EVENTS)
    expected = {"kernel": 2.0, "unpack": 0.75, "udev": 2.25, "network": 1.0, "time": 0.2, "fetch": 2.1, "mount": 0.5}
    assert found == pytest.approx({**expected, "switch": 0.7})
    assert sum(found.values()) == pytest.approx(9.5)


def test_another_initramfs_tells_of_the_kernel_only() -> None:
    assert plot.phases(CONSOLE, "") == pytest.approx({"kernel": 2.0, "unpack": 0.75})
    assert plot.phases("", EVENTS) == {}


def test_medians_are_taken_of_the_boots_that_have_a_phase() -> None:
    boots = [{"fetch": 3.0}, {"kernel": 1.0, "fetch": 1.0}, {"fetch": 2.0}]
    assert list(plot.medians(boots).items()) == [("kernel", 1.0), ("fetch", 2.0)]


def test_the_plot_is_a_bar_for_each_name_in_proportion() -> None:
    drawn = ElementTree.fromstring(plot.svg("A & B", {"a<b": {"kernel": 1.0, "fetch": 3.0}, "c": {"all": 2.0}}))  # noqa: S314 - our own text
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in drawn.iter(f"{space}text")]
    assert texts[:3] == ["A & B", "a<b", "4.0 s"]
    widths = {
        (bar[0].text or "").partition(":")[0]: float(bar.attrib["width"])
        for bar in drawn.iter(f"{space}rect")
        if len(bar)
    }
    assert widths["fetch"] == pytest.approx(3 * widths["kernel"], abs=0.2)
    assert widths["all"] == pytest.approx(2 * widths["kernel"], abs=0.2)
