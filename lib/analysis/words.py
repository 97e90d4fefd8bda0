"""Numbers as words, alike on every page: ratios with their intervals, bytes, lists."""

import numpy as np

from lib.analysis.style import GIB, KIB, MIB

NEAR = 1.5  # a ratio closer to 1 is said in percent


def cost(row) -> str:
    """A ratio in words, with its interval: "2.1 % less [1.4, 2.8]", "÷ 6.1 [6.0, 6.2]", "× 3.3 [3.2, 3.4]"."""
    ratio, ends = row.ratio, [] if np.isnan(row.low) else [row.low, row.high]
    less = ratio < 1
    if 1 / NEAR < ratio < NEAR:
        numbers = [100 * (1 - x if less else x - 1) for x in (ratio, *ends)]
        words = [f"{round(number, 1) + 0:.1f}" for number in numbers]  # and no -0.0
        first, rest = f"{words[0]} % {'less' if less else 'more'}", words[1:]
    else:
        words = [f"{x:.2f}" if x < 2.95 else f"{x:.1f}" for x in (1 / x if less else x for x in (ratio, *ends))]
        first, rest = f"{'÷' if less else '×'} {words[0]}", words[1:]
    low, high = sorted(rest, key=float) if rest else ("", "")
    return f"{first} [{low}, {high}]" if rest else first


def factor(row) -> str:
    """A ratio as a figure has room for: "÷6.1", "×3.3", "+24.0 %"; as `cost` says it."""
    if 1 / NEAR < row.ratio < NEAR:
        return f"{100 * (row.ratio - 1):+.1f} %".replace("-", "−")
    ratio, sign = (1 / row.ratio, "÷") if row.ratio < 1 else (row.ratio, "×")
    return f"{sign}{ratio:.{2 if ratio < 2.95 else 1}f}"


def size(count: float) -> str:
    """Bytes in the unit that leaves the fewest digits."""
    unit, name = (GIB, "GiB") if count >= 4 * GIB else (MIB, "MiB") if count >= 0.1 * MIB else (KIB, "KiB")
    value = count / unit
    return f"{value:,.0f} {name}" if value >= 99.5 else f"{value:.3g} {name}"


def joined(parts: list[str]) -> str:
    """A, B and C."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def counted(count: int, what: str) -> str:
    """1 round, 8 rounds, no rounds."""
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"
