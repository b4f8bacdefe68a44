"""A record in words and in pictures."""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from helpers.speed.record import BOTH, FORWARD, Record
from helpers.teaching import COLORS, GREY

# One look for a function, so that rivals of one kind are seen to belong together.
_COLOURS = {
    "softmax": [COLORS["orange"], COLORS["amber"], COLORS["purple"], COLORS["black"], GREY],
    "linear": [COLORS["blue"], COLORS["sky"]],
    "bare": [COLORS["green"], "#66C2A5", "#1B7837"],
}
_MARKERS = "os^Dv*Px<>"


def title(record: Record) -> str:
    """Device, date and shape in a line."""
    device, settings = record.device, record.settings
    threads = f", {device['threads']} thread{'s' * (device['threads'] > 1)}" if "threads" in device else ""
    return (
        f"{device['name']}{threads}, {record.date[:10]}, torch {record.versions['torch']}: batch {settings['batch']}, "
        f"{settings['heads']} heads, {settings['features']} features, {settings['dtype']}"
    )


def stem(record: Record) -> str:
    """File name, without its end, for a device and a setting."""
    settings = record.settings
    parts = [str(record.device["name"]), *[f"{record.device['threads']}t"] * ("threads" in record.device)]
    parts += [f"b{settings['batch']}h{settings['heads']}d{settings['features']}", str(settings["dtype"])]
    return "-".join(re.findall(r"[a-z0-9]+", " ".join(parts).lower()))


def fastest(record: Record, function: str, direction: str) -> str | None:
    """Name of the method of that function that is fastest at the longest length that any of them reaches."""
    ends = [curve[-1] for name, kind in record.functions.items() if kind == function
            and (curve := record.curve(name, direction))]  # fmt: skip
    if not ends:
        return None
    longest = max(point.n for point in ends)
    return min((point for point in ends if point.n == longest), key=lambda point: point.median).method


def summarise(record: Record) -> str:
    """Return the table of medians, the exponents, the crossings, the floors, and what was left out."""
    lines = [title(record)]
    for direction in (FORWARD, BOTH):
        curves = {name: {p.n: p for p in record.curve(name, direction)} for name in record.functions}
        lengths = sorted({n for curve in curves.values() for n in curve})
        head = f"{direction}, milliseconds (median; ~ where the repeats are far apart)"
        lines += ["", head, f"{'n':>10}" + "".join(f"{name:>18}" for name in curves)]
        for n in lengths:
            points = (curve.get(n) for curve in curves.values())
            cells = (f"{'-':>18}" if p is None else f"{'~' * p.noisy + f'{1e3 * p.median:.3f}':>18}" for p in points)
            lines.append(f"{n:10,}" + "".join(cells))
        slopes = (record.exponent(name, direction) for name in curves)
        lines.append(f"{'grows as':>10}" + "".join(f"{'-' if s is None else f'n^{s:.2f}':>18}" for s in slopes))
        lines += _sentences(record, direction)
    lines += [f"left out: {name} ({why})" for name, why in record.left_out.items()]
    lines += [
        f"{p.method}, {p.direction}, ends before n = {p.n:,}: {p.note}"
        for p in record.points
        if p.note and "share of the time" not in p.note
    ]
    return "\n".join(lines)


def _sentences(record: Record, direction: str) -> list[str]:
    """Who overtakes whom and where; and how near each comes to what the device can do at best."""
    found, softmax = [], fastest(record, "softmax", direction)
    for name, function in record.functions.items():
        curve = record.curve(name, direction)
        if not curve:
            continue
        if function != "softmax" and softmax:
            slow = {p.n: p.median for p in record.curve(softmax, direction)}
            if shared := [p for p in curve if p.n in slow]:
                gain = slow[shared[-1].n] / shared[-1].median
                part = f"1/{gain:.1f} of the time" if gain > 1 else f"{1 / gain:.1f} times as long"
                ratio = f"at {shared[-1].n:,} it takes {part}"
                crossing = record.crossing(softmax, name, direction)
                if crossing is None:
                    found.append(f"{name} does not overtake {softmax} up to n = {shared[-1].n:,}: {ratio}")
                elif crossing == shared[0].n:
                    found.append(f"{name} is ahead of {softmax} from the shortest length on; {ratio}")
                else:
                    found.append(f"{name} overtakes {softmax} at n = {crossing:,.0f}; {ratio}")
        share = record.floor(function, direction, curve[-1].n) / curve[-1].median
        best = f"{100 * share:.0f} % of the speed" if share <= 1 else "above the speed (so that was measured too low)"
        found.append(f"{name} at n = {curve[-1].n:,}: {best} that the device could have")
    return found


def draw(record: Record) -> Figure:
    """Draw time forward, time forward and backward, and peak memory of both, against n; dashed: what is possible."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9))
    marker = dict(zip(record.functions, _MARKERS, strict=False))
    left = {function: list(colours) for function, colours in _COLOURS.items()}
    colour = {name: left[function].pop(0) for name, function in record.functions.items()}
    for ax, direction in zip(axes, (FORWARD, BOTH), strict=False):
        for name in record.functions:
            if curve := record.curve(name, direction):
                ax.plot([p.n for p in curve], [1e3 * p.median for p in curve], color=colour[name], ls="-",
                        marker=marker[name], ms=4, lw=1.4, label=name)  # fmt: skip
        _draw_floors(ax, record, direction)
        ax.set(title=direction, ylabel="milliseconds")
    for name in record.functions:
        curve = [p for p in record.curve(name, BOTH) if p.peak_bytes]
        axes[2].plot([p.n for p in curve], [p.peak_bytes / 1e6 for p in curve], color=colour[name], ls="-",
                     marker=marker[name], ms=4, lw=1.4)  # fmt: skip
    axes[2].set(title=f"{BOTH}: memory", ylabel="MB at the peak")
    lengths = sorted({point.n for point in record.points if point.seconds})
    ticks = lengths[:: max(1, len(lengths) // 4)]
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="n, tokens", xticks=ticks)
        ax.set_xticklabels([f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _draw_floors(ax: Axes, record: Record, direction: str) -> None:
    for function in ("softmax", "linear"):
        chosen = (name for name, kind in record.functions.items() if kind == function)
        lengths = sorted({point.n for name in chosen for point in record.curve(name, direction)})
        if lengths:
            floor = [1e3 * record.floor(function, direction, n) for n in lengths]
            ax.plot(lengths, floor, color=GREY, ls="--" if function == "softmax" else ":", lw=1.2,
                    label=f"{function}, at best")  # fmt: skip
