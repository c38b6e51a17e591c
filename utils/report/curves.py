"""Curves for the report: metrics.jsonl in, small inline SVG out. Standard library only, fast for long runs.

A run of a hundred thousand steps must not make a page of a hundred thousand points, so a curve is cut into as many
columns as a screen can tell apart; each column keeps its lowest and highest value, so no spike disappears.
"""

import json
import math
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 540, 250  # drawing units; the page scales them, so the lettering below is sized for a phone
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 34
COLUMNS = 240  # columns of a raw curve
STEADY = 50  # values in the mean that is told as a number
HITS = 90  # columns that answer to the pointer


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, in order of their step.

    A run that was killed and resumed from an earlier checkpoint has walked some steps twice; the later line counts.
    A line cut by a kill, or one without a step, is left out.
    """
    rows = []
    if not path.is_file():
        return rows
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            step = row.get("step") if isinstance(row, dict) else None
            if isinstance(step, bool) or not isinstance(step, int | float):
                continue
            if rows and rows[-1]["step"] > step:  # equal is fine: two lines may tell different things of one step
                while rows and rows[-1]["step"] >= step:
                    rows.pop()
            rows.append(row)
    return rows


def series(rows: list[dict], key: str) -> tuple[list, list, int]:
    """Steps and values of one name, and how many values were left out because they are not finite."""
    steps, values, lost = [], [], 0
    for row in rows:
        value = row.get(key)
        if value in ("nan", "inf", "-inf"):  # strict JSON has no other way to say it
            lost += 1
        elif value is None or isinstance(value, bool | str | list | dict):
            continue
        elif math.isfinite(value):
            steps.append(row["step"])
            values.append(value)
        else:
            lost += 1
    return steps, values, lost


def names(rows: list[dict]) -> list[str]:
    """Every numeric name except the step, in order of first appearance."""
    found = {}
    for row in rows:
        for key, value in row.items():
            if key not in found and key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found[key] = None
    return list(found)


def smooth(values: list, window: int) -> list:
    """Exponential average over about `window` values, corrected at the start as Adam corrects its moments."""
    keep = 1 - 1 / max(window, 1)
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def smoothed_end(values: list) -> float:
    """The one number that stands for a loss, on the terminal and on the page; steadier than a short run's curve."""
    recent = values[-20 * STEADY :]  # asked for with every line: what lies before counts exp(-20)
    return smooth(recent, STEADY)[-1]


def window_for(count: int) -> int:
    """How much to smooth: a thirtieth of what there is, within reason."""
    return max(5, min(200, count // 30))


def thin(steps: list, values: list, columns: int) -> tuple[list, list]:
    """At most two points a column, its lowest and its highest in the order they came; short curves stay whole."""
    if len(steps) <= 2 * columns:
        return steps, values
    first, span = steps[0], max(steps[-1] - steps[0], 1e-9)
    kept_steps, kept_values, start = [], [], 0
    edges = [int((step - first) / span * columns) for step in steps]
    for i in range(1, len(steps) + 1):
        if i == len(steps) or edges[i] != edges[start]:
            low = min(range(start, i), key=values.__getitem__)
            high = max(range(start, i), key=values.__getitem__)
            ends = {0} if start == 0 else {len(steps) - 1} if i == len(steps) else set()
            for j in sorted({low, high} | ends):
                kept_steps.append(steps[j])
                kept_values.append(values[j])
            start = i
    return kept_steps, kept_values


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    raw = (high - low) / max(count, 1)
    if not raw > 0:
        return [low]
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + k) * step, 12) for k in range(int((high - first * step) / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short and readable: 0.0312, 5e-06, 12,000."""
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if 0.001 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3g}".partition("e")[::2]
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def chart(title: str, lines: list[tuple[str, list, list, str]], crop_spikes: bool = False, shares: bool = False) -> str:
    """An SVG with axes, grid and hover titles. lines: (label, steps, values, class of the stroke).

    With `crop_spikes` the axis follows the middle 98 % of the values, so that one wild step does not flatten the rest;
    the pointer still shows the true values. With `shares` it ends at 0 and 1, if no value is beyond.
    """
    lines = [line for line in lines if line[1]]
    if not lines:
        return ""
    first, last = min(line[1][0] for line in lines), max(line[1][-1] for line in lines)
    every = sorted(value for line in lines for value in line[2])
    cut = len(every) // 100 if crop_spikes else 0
    low, high = every[cut], every[-1 - cut]
    if high - low <= 1e-12 * max(abs(high), abs(low)):  # a flat line stands in the middle
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    else:
        pad = (high - low) * 0.06
        low, high = (0.0 if 0 <= low <= pad * 4 else low - pad), high + pad
    if shares and every[0] >= 0 and every[-1] <= 1:
        low, high = max(low, 0.0), min(high, 1.0)
    span = (last - first) or 1
    scale_x, scale_y = (WIDTH - LEFT - RIGHT) / span, (HEIGHT - TOP - BOTTOM) / (high - low)

    def x(step):
        return LEFT + (step - first) * scale_x

    def y(value):  # far outside is kept just outside: huge coordinates upset renderers
        return min(max(HEIGHT - BOTTOM - (value - low) * scale_y, -HEIGHT), 2 * HEIGHT)

    clip = "clip-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in title)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        # A little higher than the frame: a line along its edge would be cut in half.
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT}"'
        f' height="{HEIGHT - TOP - BOTTOM + 8}"/></clipPath>',
    ]
    for value in ticks(low, high, 4):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4.5:.1f}" text-anchor="end">{number(value)}</text>')
    for step in ticks(first, last, 5):
        parts.append(f'<line class="grid" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{number(step)}</text>')
    parts.append(
        f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/><g clip-path="url(#{clip})">'
    )
    for _, steps, values, style in lines:
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(*thin(steps, values, COLUMNS)))
        if len(steps) == 1:
            parts.append(f'<circle class="{style}" cx="{x(steps[0]):.1f}" cy="{y(values[0]):.1f}" r="3.5"/>')
        else:
            parts.append(f'<polyline class="{style}" points="{points}"/>')
    parts.append("</g>")
    parts += _hits(lines, x)
    return "".join(parts) + "</svg>"


def _hits(lines, x) -> list[str]:
    """Transparent columns with a title each: the values under the pointer, without any script."""
    steps = lines[0][1]
    stride = max(1, math.ceil(len(steps) / HITS))
    middles = list(range(stride // 2, len(steps), stride))
    tables = [dict(zip(line[1], line[2])) for line in lines]
    parts = []
    for k, i in enumerate(middles):
        left = LEFT if k == 0 else (x(steps[middles[k - 1]]) + x(steps[i])) / 2
        right = WIDTH - RIGHT if k == len(middles) - 1 else (x(steps[middles[k + 1]]) + x(steps[i])) / 2
        told = [f"{line[0]} {number(table[steps[i]])}" for line, table in zip(lines, tables) if steps[i] in table]
        parts.append(
            f'<rect class="hit" x="{left:.1f}" y="{TOP}" width="{max(right - left, 0.5):.1f}"'
            f' height="{HEIGHT - TOP - BOTTOM}"><title>{escape(f"step {number(steps[i])}: " + ", ".join(told))}'
            "</title></rect>"
        )
    return parts
