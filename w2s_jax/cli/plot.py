"""`w2s plot`: curves of one or several training runs, drawn to a PNG from their metrics files."""

from dataclasses import dataclass

from w2s_jax.train.config import PlotConfig


@dataclass(frozen=True)
class Plot(PlotConfig):
    """Draw the curves of training runs to a PNG: loss, rewards, accuracies and what else there is.

    Needs matplotlib: pip install 'w2s-jax[plot]'.
    """

    def run(self) -> None:
        """Read the runs and draw them."""
        from w2s_jax.train.curves import plot

        print(plot(self))
