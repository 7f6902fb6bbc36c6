"""Method "integrated_gradients" (Sundararajan, Taly, Yan, ICML 2017, equation 1), by default from embeddings of zero."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlattn_fast._ground.checks import check_integer
from vlattn_fast.interpret.relevancy.embedding_method import Baseline, EmbeddingMethod
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace


class IntegratedGradients(EmbeddingMethod):
    """sum_c (x - x0)_c g_c, x0 a baseline, g the mean over `n_steps` embeddings x0 + alpha (x - x0) (Sundararajan et al. 2017).

    It is (x - x0) . integral over alpha from 0 to 1 of the gradient at x0 + alpha (x - x0), by the midpoint rule: alpha =
    (k + 1/2) / n_steps. The embeddings of all towers move together, so all entries add up to the score's gain over that of the
    baseline, as the number of steps grows; `explain` warns where a tenth of the gain is missing. Each step is a forward and a
    backward pass, of which only the sum of the rows is kept.
    """

    name = "integrated_gradients"
    completes = True

    def __init__(
        self, n_steps: int = 32, baseline: Baseline = None, *, freeze: Sequence[str] | None = None, of: str | None = None
    ) -> None:
        """
        Args:
            n_steps: how many embeddings between the baseline's and the input's the model runs on, one after the other.
            baseline: see `InputGradient`.
            freeze: see `Method`. With it, entries do not add up to the gain.
            of: see `Method`.

        Raises:
            TypeError, ValueError: an option is of no such kind.
        """
        check_integer("n_steps", n_steps, low=1)
        self.n_steps = n_steps
        super().__init__(baseline, freeze=freeze, of=of)

    @property
    def steps(self) -> int:
        return self.n_steps

    def begin(self) -> None:
        super().begin()
        self.alpha = 1.0

    def at_step(self, step: float) -> None:
        self.alpha = step / self.n_steps

    def entering(self, tower: TowerTrace, values: Tensor, origin: Tensor | None, dim: int | None) -> Tensor:
        if self.alpha == 1.0:
            return values * 1
        return values * self.alpha if origin is None else origin + (values - origin) * self.alpha
