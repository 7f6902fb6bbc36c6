"""Method "smoothgrad": input times gradient, whose gradient is the mean under noise (Smilkov et al. 2017, arXiv 1706.03825)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer, check_number
from vlattn_fast.interpret.relevancy.embedding_method import Baseline, EmbeddingMethod
from vlattn_fast.interpret.relevancy.method import Enter
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace

NOISE = 0.1


class SmoothGrad(EmbeddingMethod):
    """Multiplies x - x0 by the mean gradient at `n_samples` embeddings x + noise, x0 a baseline (Smilkov et al. 2017).

    It costs `n_samples` forward and backward passes, and supports any model. The noise is Gaussian and drawn anew for each
    number. The paper (arXiv 1706.03825) shows the mean gradient itself; multiplied by x it has a sign, and can be compared with
    "input_gradient".

    Examples:
        >>> import vlattn_fast as va
        >>> va.methods.SmoothGrad(n_samples=32, seed=1)  # pass it as va.explain(..., method=...)
        <method smoothgrad(n_samples=32, seed=1)>
    """

    name = "smoothgrad"

    def __init__(
        self,
        n_samples: int = 16,
        noise: float = NOISE,
        baseline: Baseline = None,
        *,
        seed: int = 0,
        freeze: Sequence[str] | None = None,
        of: str | None = None,
    ) -> None:
        """
        Args:
            n_samples: the number of noisy embeddings that the model runs on, one after the other.
            noise: the standard deviation of the noise, relative to the range of a sample's embeddings (or pixels) in a tower:
                their largest number less their smallest.
            baseline: see `InputGradient`.
            seed: the seed of the noise, which is the same in every call.
            freeze, of: see `Method`.

        Raises:
            TypeError, ValueError: an option has a wrong type or value.
        """
        check_integer("n_samples", n_samples, low=1)
        check_number("noise", noise, low=0.0)
        check_integer("seed", seed, low=0)
        self.n_samples, self.noise, self.seed = n_samples, noise, seed
        super().__init__(baseline, freeze=freeze, of=of)

    @property
    def n_runs(self) -> int:
        return self.n_samples

    def changes(self) -> Sequence[Enter]:
        return [partial(self._noisy, torch.Generator().manual_seed(self.seed))] * self.n_samples

    def _noisy(self, generator: torch.Generator, tower: TowerTrace, values: Tensor, origin: Tensor | None) -> Tensor:
        rows = values.detach().flatten(1)
        scale = (rows.amax(1) - rows.amin(1)).view(-1, *[1] * (values.ndim - 1)) * self.noise
        return values + scale * torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values)
