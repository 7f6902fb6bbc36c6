"""Method "integrated_gradients" (Sundararajan, Taly, Yan, ICML 2017, equation 1), by default from embeddings of zero."""

from __future__ import annotations

from collections.abc import Sequence

from vlattn_fast._ground.checks import check_integer
from vlattn_fast.interpret.relevancy.embedding_method import Baseline, EmbeddingMethod, scaled
from vlattn_fast.interpret.relevancy.method import Enter


class IntegratedGradients(EmbeddingMethod):
    """Multiplies x - x0 by the mean gradient at `n_steps` embeddings from a baseline x0 to x (Sundararajan et al., ICML 2017).

    It costs `n_steps` forward and backward passes, of which only the sum of the relevancy vectors is kept; any model is
    supported. It is (x - x0) . integral over alpha from 0 to 1 of the gradient at x0 + alpha (x - x0), x0 a baseline (equation
    1), with the midpoint rule: alpha = (k + 1/2) / n_steps. The embeddings of all towers move together, so all entries add up to
    the score's gain over that of the baseline, as the number of steps grows; `explain` warns if a tenth of the gain is missing.

    Examples:
        >>> import vlattn_fast as va
        >>> va.methods.IntegratedGradients(n_steps=64, baseline="black")  # pass it as va.explain(..., method=...)
        <method integrated_gradients(n_steps=64, baseline=black)>
    """

    name = "integrated_gradients"
    completes = True

    def __init__(
        self, n_steps: int = 32, baseline: Baseline = None, *, freeze: Sequence[str] | None = None, of: str | None = None
    ) -> None:
        """
        Args:
            n_steps: the number of embeddings between the baseline's and the input's that the model runs on, one after the other.
            baseline: see `InputGradient`.
            freeze: see `Method`. Unless it is (), entries do not add up to the gain.
            of: see `Method`.

        Raises:
            TypeError, ValueError: an option has a wrong type or value.
        """
        check_integer("n_steps", n_steps, low=1)
        self.n_steps = n_steps
        super().__init__(baseline, freeze=freeze, of=of)

    @property
    def n_runs(self) -> int:
        return self.n_steps

    def changes(self) -> Sequence[Enter]:
        return [scaled((number + 0.5) / self.n_steps) for number in range(self.n_steps)]
