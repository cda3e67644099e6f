"""The benchmark's chart: one bar per case for the speed of swimg relative to its peer."""

import math
import os
from xml.sax.saxutils import escape

LEFT, WIDTH, ROW, TOP = 300, 460, 22, 40


def machine():
    """Cores, processor and memory of this machine in a few words."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{os.cpu_count()} cores of {names[0] if names else 'a processor'}, {memory:.0f} GiB"


def svg(bars):
    """The chart as SVG. `bars`: name, ratio and goal of each case. The scale is logarithmic, so
    twice as fast is as far from 1 as twice as slow."""
    largest = max(4.0, *(max(ratio, goal) for _, ratio, goal in bars)) * 1.1
    low, high = math.log(0.25), math.log(largest)

    def x(ratio):
        return LEFT + WIDTH * (math.log(max(ratio, 0.25)) - low) / (high - low)

    height = TOP + ROW * len(bars) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 70}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="16">times as fast as qemu-img (the mark is the goal)</text>',
    ]
    tick = 0.25
    while tick <= largest:
        parts.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP - 6}" y2="{height - 16}" '
            f'stroke="{"#555" if tick == 1 else "#ddd"}"/>'
            f'<text x="{x(tick):.1f}" y="{TOP - 10}" text-anchor="middle" fill="#555">{tick:g}</text>')
        tick *= 2
    for index, (name, ratio, goal) in enumerate(bars):
        y = TOP + ROW * index
        left, right = sorted([x(1), x(ratio)])
        colour = "#2a7" if ratio >= goal else "#e90" if ratio >= 1 else "#c44"
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{left:.1f}" y="{y + 3}" width="{right - left:.1f}" height="{ROW - 8}" '
            f'fill="{colour}"/>'
            f'<line x1="{x(goal):.1f}" x2="{x(goal):.1f}" y1="{y + 1}" y2="{y + ROW - 3}" '
            'stroke="black" stroke-width="2"/>'
            f'<text x="{right + 6:.1f}" y="{y + 14}">{ratio:.2f}</text>')
    return "\n".join(parts + ["</svg>\n"])
