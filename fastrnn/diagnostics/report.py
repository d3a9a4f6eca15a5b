"""The results of `fastrnn.diagnostics.diagnose`: values, text, table and plot."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class LayerDiagnosis:
    """Measurements of one layer and direction. The tensors are on the CPU.

    Attributes:
        name: the module's name in the model with the layer and direction: ``encoder.l0_reverse``.
            The name of a cell has no layer.
        cell: the name of its cell: ``rnn_tanh``, ``rnn_relu``, ``rnn_sigmoid``, ``lstm``, ``gru``.
        hidden_gradient: [T] float64, the 2-norm over batch and units of the gradient of the loss
            with respect to h after each step, in the order of time for both directions.
        cell_gradient: [T] float64, the same for c; None without a cell state.
        spectral_radius: for each gate, the largest absolute eigenvalue of its block of ``w_hh``
            [H,H], float64 scalar. With a projection, of ``w_hr`` times its block [H,P]. The gate of
            an RNN is called ``h``. NaN if a weight is not finite.
        saturation: for each gate, [2] float64: the fractions of its activations below and above
            the bounds, over all steps, sequences and units. The bounds are 0.1 and 0.9 for a
            sigmoid, -0.9 and 0.9 for tanh (g of an LSTM, n of a GRU, h of an RNN). ReLU has none.
        dead: [R] bool, the units whose output is the same in all steps and sequences; with ReLU
            also the units whose output is never above zero.
    """

    name: str
    cell: str
    hidden_gradient: Tensor
    cell_gradient: Tensor | None
    spectral_radius: Mapping[str, Tensor]
    saturation: Mapping[str, Tensor]
    dead: Tensor

    def _texts(self) -> dict[str, str]:
        """Returns the cells of this layer's row in the table."""
        return {
            "layer": self.name,
            "cell": self.cell,
            "gradient at h": _range(self.hidden_gradient),
            "gradient at c": "" if self.cell_gradient is None else _range(self.cell_gradient),
            "spectral radius": ", ".join(f"{g} {r:.3g}" for g, r in self.spectral_radius.items()),
            "saturated low/high": ", ".join(
                f"{gate} {low:.0%}/{high:.0%}"
                for gate, (low, high) in ((g, s.tolist()) for g, s in self.saturation.items())
            ),
            "dead units": f"{int(self.dead.sum())} of {self.dead.numel()}",
        }


@dataclass(frozen=True)
class Diagnosis:
    """Measurements of all recurrent layers of a model; ``str()`` gives a readable summary.

    Attributes:
        loss: the value of the loss.
        layers: each layer and direction by name, in the order of their first calls.
    """

    loss: float
    layers: Mapping[str, LayerDiagnosis]

    def __str__(self) -> str:
        lines = [f"loss {self.loss:.4g}"]
        for layer in self.layers.values():
            texts = layer._texts()
            lines.append(f"{texts.pop('layer')} ({texts.pop('cell')})")
            lines += [f"  {what}: {text}" for what, text in texts.items() if text]
        return "\n".join(lines)

    def table(self) -> Table:
        """Returns a table for ``rich.print`` with a row per layer and direction.

        Gradients are shown as their smallest and largest norm, with the steps.

        Raises:
            ModuleNotFoundError: rich is not installed.
        """
        _require("rich", "table")
        from rich.table import Table

        table = Table(title=f"Recurrent layers, loss {self.loss:.4g}")
        rows = [layer._texts() for layer in self.layers.values()]
        for column in rows[0]:
            table.add_column(column)
        for row in rows:
            table.add_row(*row.values())
        return table

    def plot(self) -> Figure:
        """Returns a figure: gradients over time, spectral radii and saturation of the gates.

        ``figure.savefig(path)`` writes it. The global state of pyplot does not change.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        _require("matplotlib", "plot")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 10), layout="constrained")
        gradients, radii, saturation = figure.subplots(3, 1)
        self._plot_gradients(gradients)
        self._plot_radii(radii)
        self._plot_saturation(saturation)
        return figure

    def _plot_gradients(self, axes: Axes) -> None:
        is_positive = False
        for layer in self.layers.values():
            curves = [("h", "-", layer.hidden_gradient), ("c", "--", layer.cell_gradient)]
            color = None
            for state, style, norms in curves:
                if norms is None:
                    continue
                is_positive = is_positive or bool((norms > 0).any())
                # zero has no place on a logarithmic axis
                values = norms.where(norms > 0, float("nan")).tolist()
                marker = "o" if len(values) == 1 else None
                label = f"{layer.name}: {state}"
                (line,) = axes.plot(values, style, color=color, marker=marker, label=label)
                color = line.get_color()
        if is_positive:
            axes.set_yscale("log")
        axes.set_title("gradient of the loss with respect to the states")
        axes.set_xlabel("time step")
        axes.set_ylabel("2-norm (loss per unit of state)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")

    def _plot_radii(self, axes: Axes) -> None:
        names = [
            (f"{layer.name}: {gate}", float(radius))
            for layer in self.layers.values()
            for gate, radius in layer.spectral_radius.items()
        ]
        axes.bar(range(len(names)), [radius for _, radius in names])
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        _name_bars(axes, [name for name, _ in names])
        axes.set_title("spectral radius of w_hh per gate")
        axes.set_xlabel("layer and gate")
        axes.set_ylabel("largest |eigenvalue| (no unit)")

    def _plot_saturation(self, axes: Axes) -> None:
        bars = [
            (f"{layer.name}: {gate}", *(100 * fractions).tolist())
            for layer in self.layers.values()
            for gate, fractions in layer.saturation.items()
        ]
        positions = range(len(bars))
        lows = [low for _, low, _ in bars]
        axes.bar(positions, lows, label="low (sigmoid < 0.1, tanh < -0.9)")
        axes.bar(positions, [high for *_, high in bars], bottom=lows, label="high (> 0.9)")
        _name_bars(axes, [name for name, *_ in bars])
        axes.set_ylim(0, 100)
        axes.set_title("saturated gates")
        axes.set_xlabel("layer and gate")
        axes.set_ylabel("activations (%)")
        axes.legend(fontsize="small")


def _name_bars(axes: Axes, names: list[str]) -> None:
    """Names bars 0, 1, ... in upright text, because a model may have dozens."""
    axes.set_xticks(range(len(names)), names, fontsize="x-small", rotation=90)


def _range(norms: Tensor) -> str:
    """Returns the smallest and the largest norm with their steps."""
    if not bool(norms.isfinite().all()):
        steps = torch.nonzero(~norms.isfinite()).flatten().tolist()
        return f"not finite at {len(steps)} of {len(norms)} steps, from {steps[0]} to {steps[-1]}"
    low, high = int(norms.argmin()), int(norms.argmax())
    return f"{norms[low]:.2e} (step {low}) to {norms[high]:.2e} (step {high})"


def _require(package: str, method: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"Diagnosis.{method}: {package} must be installed: pip install 'fastrnn[diagnostics]'",
            name=package,
        )
