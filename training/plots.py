"""Figures of the training rooms: the head map and the loss curve (matplotlib, imported on use)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .calibration import Calibration


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def plot_heads(calibration: Calibration, path: str | Path) -> None:
    """Heat map of the retrieval scores, scored layers by heads, with the chosen heads framed, as PNG."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    layers = [layer for layer, row in enumerate(calibration.scores) if row]
    rows = [calibration.scores[layer] for layer in layers]
    heads = len(rows[0])
    cell = max(0.16, min(0.3, 12 / max(heads, len(layers))))
    figure = _figure(max(4.5, heads * cell + 2.0), max(2.2, len(layers) * cell + 1.2))
    axes = figure.subplots()
    shown = [[max(score, 1e-3) for score in row] for row in rows]
    image = axes.imshow(shown, cmap="viridis", norm=LogNorm(1e-3, 1.0), aspect="equal", interpolation="nearest")
    for y, layer in enumerate(layers):
        for head in calibration.retrieval_heads[layer]:
            frame = Rectangle((head - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.4)
            axes.add_patch(frame)
    step = max(1, -(-len(layers) // 24))
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    step = max(1, -(-heads // 24))
    axes.set_xticks(range(0, heads, step))
    axes.tick_params(labelsize=8)
    count = sum(map(len, calibration.retrieval_heads))
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_title(f"Retrieval score; {count} of {heads * len(layers)} heads chosen (red)", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8, label="attention mass on the needle")
    _save(figure, path)


def plot_losses(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Training loss, and held-out KL where it was measured, by step, as PNG.

    Raises:
        ValueError: the history holds no loss.
    """
    train = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    held_out = [(entry["step"], entry["eval_kl"]) for entry in log_history if "eval_kl" in entry]
    if not train:
        raise ValueError(f"the log history ({len(log_history)} entries) holds no training loss to plot")
    figure = _figure(6.4, 3.8)
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1.4, label="training rows")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", color="tab:orange", label="held-out text rows")
    axes.set_xlabel("step")
    axes.set_ylabel("KL, nats per head")
    axes.set_ylim(bottom=0)
    axes.set_title("Stage 1: index against exact attention", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)
