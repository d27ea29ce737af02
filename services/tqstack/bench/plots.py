"""Pictures of measurements. matplotlib is an extra: `pip install tqstack[plot]`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def _figure(width: float = 8, height: float = 4.5, panels: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(width, height), constrained_layout=True)
    for axis in [axes] if panels == 1 else axes:
        axis.grid(alpha=0.3)
    return figure, axes


def speed(rows: list[Any], path: Path) -> None:
    """Decode speed and bytes of keys and values over the context, a line per backend."""
    figure, (left, right) = _figure(10, panels=2)
    for backend in dict.fromkeys(row.backend for row in rows):
        line = [row for row in rows if row.backend == backend]
        lengths = [row.context + row.prompt_tokens for row in line]
        left.plot(lengths, [row.decode_tps for row in line], "o-", label=backend)
        right.plot(lengths, [row.kv_bytes / 1e6 for row in line], "o-", label=backend)
    left.set(xlabel="tokens of context", ylabel="decode, tokens per second", ylim=(0, None))
    right.set(xlabel="tokens of context", ylabel="keys and values, MB")
    right.set_yscale("log")
    left.legend()
    figure.savefig(path, dpi=150)


def quality(rows: list[dict[str, Any]], path: Path) -> None:
    """KL divergence over bits per value, a point per codec, a line per family.

    Broken lines and hollow points: every token is coded at once, none stays exact.
    """
    figure, axis = _figure()
    families = list(dict.fromkeys(_family(row["codec"]) for row in rows))
    for family, all_coded in dict.fromkeys(map(_line, rows)):
        points = sorted(
            (row["bits_per_value"], max(row["kl_divergence"], 1e-7), row["codec"].split("@")[0])
            for row in rows
            if _line(row) == (family, all_coded)
        )
        color, face = f"C{families.index(family)}", "none" if all_coded else None
        label = f"{family}, every token coded" if all_coded else family
        # Mixed pairs stand beside their family's line, not on it.
        pure = [(x, y) for x, y, name in points if "/" not in name]
        mixed = [(x, y) for x, y, name in points if "/" in name]
        axis.plot(
            [x for x, _ in pure],
            [y for _, y in pure],
            "o--" if all_coded else "o-",
            label=label,
            color=color,
            markerfacecolor=face,
        )
        axis.plot([x for x, _ in mixed], [y for _, y in mixed], "x", color=color)
        for x, y, name in points:
            axis.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set(
        xlabel="bits per value in 32,768 tokens, really stored",
        ylabel="KL divergence, nats per token",
    )
    axis.set_yscale("log")
    axis.margins(x=0.18)
    axis.legend(loc="lower left")  # few bits, little divergence: empty
    figure.savefig(path, dpi=150)


def evaluate(rows: list[Any], path: Path) -> None:
    """KL divergence over bits per weight, a point per model; the reference has none."""
    figure, axis = _figure()
    points = [row for row in rows if row.kl_divergence is not None]
    for mark, line in (("o-", "mlx affine"), ("s", "")):
        chosen = [row for row in points if row.model.startswith("mlx affine") == bool(line)]
        chosen.sort(key=lambda row: row.bits_per_weight)
        for row in chosen:
            at = (row.bits_per_weight, max(row.kl_divergence, 1e-7))
            axis.annotate(row.model, at, xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.plot(
            [row.bits_per_weight for row in chosen],
            [max(row.kl_divergence, 1e-7) for row in chosen],
            mark,
        )
    axis.set(xlabel="bits per weight in the coded layers", ylabel="KL divergence, nats per token")
    axis.set_yscale("log")
    axis.margins(x=0.18)
    figure.savefig(path, dpi=150)


def _line(row: dict[str, Any]) -> tuple[str, bool]:
    """(family, whether every token is coded at once): rows of one line."""
    return _family(row["codec"]), row["exact_tokens"] == 0


def _family(codec: str) -> str:
    codec = codec.split("@")[0]
    if codec.endswith("-raw"):
        return "TurboQuant, norm not corrected"
    if codec.startswith("affine"):
        return "mlx affine" if codec.endswith("none") else "affine, rotated"
    names = {"tq": "TurboQuant", "tcq": "trellis", "prod": "TurboQuant with QJL"}
    letters = re.match("[a-z]*", codec)
    return names.get(letters.group() if letters else "", codec)
