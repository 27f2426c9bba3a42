"""Where the time of a boot goes: phases from what a node says, and bars of them as SVG."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence

import jinja2

# What the kernel says on the console, with seconds since it started.
UNPACK = re.compile(r"\[ *([0-9.]+)\] Trying to unpack rootfs")
UNPACKED = re.compile(r"\[ *([0-9.]+)\] Freeing initrd memory")
INIT = re.compile(r"\[ *([0-9.]+)\] Run /init as init process")
# A node's steps (boot.json), and what they are called here.
STEPS = {
    "network": "network",
    "clock": "time",
    "auth": "auth",
    "manifest": "fetch",
    "image": "fetch",
    "mount": "mount",
    "overlay": "mount",
}
COLOURS = {
    "kernel": "#666666",
    "unpack": "#999999",
    "udev": "#0072b2",
    "network": "#56b4e9",
    "time": "#f0e442",
    "auth": "#cc79a7",
    "fetch": "#009e73",
    "mount": "#e69f00",
    "switch": "#d55e00",
    "all": "#bbbbbb",
}
TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" font-family="sans-serif" font-size="13">
<title>{{ title }}</title>
<rect width="{{ width }}" height="{{ height }}" fill="#ffffff"/>
<text x="10" y="20">{{ title }}</text>
{% for bar in bars %}
<text x="10" y="{{ bar.y + 17 }}">{{ bar.name }}</text>
{% for part in bar.parts %}
<rect x="{{ part.x }}" y="{{ bar.y }}" width="{{ part.width }}" height="24" fill="{{ part.colour }}">
<title>{{ part.name }}: {{ part.seconds }} s</title></rect>
{% endfor %}
<text x="{{ bar.end }}" y="{{ bar.y + 17 }}">{{ bar.total }} s</text>
{% endfor %}
{% for key in keys %}
<rect x="{{ key.x }}" y="{{ height - 28 }}" width="12" height="12" fill="{{ key.colour }}"/>
<text x="{{ key.x + 16 }}" y="{{ height - 17 }}">{{ key.name }}</text>
{% endfor %}
</svg>
"""


def phases(console: str, events: str) -> dict[str, float]:
    """Return the seconds of each phase until switch_root, of a node of this project; of another, only the kernel's.

    `console` is the serial console's text, `events` the lines of JSON from rd.anchor.events=.
    """
    found: dict[str, float] = {}
    began, ended, init = (pattern.search(console) for pattern in (UNPACK, UNPACKED, INIT))
    if init is None:
        return found
    found["kernel"] = float(init[1])
    if began is not None and ended is not None:
        found["unpack"] = float(ended[1]) - float(began[1])
        found["kernel"] -= found["unpack"]
    last = float(init[1])
    for line in events.splitlines():
        event = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
        if event.get("event") == "end":
            start, end = event["start_ms"] / 1000, (event["start_ms"] + event["duration_ms"]) / 1000
            # What lies between two steps belongs to the second one, and before the first one to udev.
            phase = STEPS.get(event["step"], "mount")
            if event["step"] == "network":
                found["udev"] = start - last
                last = start
            found[phase] = found.get(phase, 0.0) + end - last
            last = end
        elif event.get("event") == "switch_root":
            found["switch"] = event["at_ms"] / 1000 - last
    return found


def medians(boots: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each phase over several boots, in the order of the phases."""
    return {
        name: statistics.median(boot[name] for boot in boots if name in boot)
        for name in COLOURS
        if any(name in boot for boot in boots)
    }


def svg(title: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """Return a plot with one bar per name, of phases in seconds; they are drawn in their order."""
    left, width = 110, 760
    totals = {name: sum(parts.values()) for name, parts in bars.items()}
    scale = (width - left - 80) / (max(totals.values(), default=0.0) or 1.0)
    drawn = []
    for n, (name, parts) in enumerate(bars.items()):
        x = float(left)
        pieces = []
        for phase, seconds in parts.items():
            part = {"name": phase, "x": round(x, 1), "width": round(seconds * scale, 1), "seconds": f"{seconds:.2f}"}
            pieces.append({**part, "colour": COLOURS[phase]})
            x += seconds * scale
        end, total = round(x + 6, 1), f"{totals[name]:.1f}"
        drawn.append({"name": name, "y": 36 + 34 * n, "parts": pieces, "end": end, "total": total})
    used = [phase for phase in COLOURS if any(phase in parts for parts in bars.values())]
    keys = [{"name": phase, "colour": COLOURS[phase], "x": 10 + 74 * n} for n, phase in enumerate(used)]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=True)
    height = 36 + 34 * len(bars) + 40
    return (
        environment.from_string(TEMPLATE).render(title=title, width=width, height=height, bars=drawn, keys=keys) + "\n"
    )
