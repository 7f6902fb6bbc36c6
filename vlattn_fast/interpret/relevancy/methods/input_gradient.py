"""Method "input_gradient": a token's embedding times the score's gradient there (Shrikumar et al. 2016, arXiv 1605.01713).

With a baseline, the baseline's embedding is subtracted first, as in the first step of DeepLIFT and of integrated gradients.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlattn_fast.interpret.relevancy.embedding_method import EmbeddingMethod
from vlattn_fast.interpret.relevancy.method import FREEZABLE


class InputGradient(EmbeddingMethod):
    """Multiplies embeddings by gradients: sum_c x_c g_c; below zero it lowers the score, to first order (Shrikumar et al. 2016).

    It costs one forward and one backward pass, and supports any model, with any attention or none. Embeddings are what enters
    the first layer of a tower; in a model without an adapter each input is a tower with the input's name. arXiv 1605.01713.

    Examples:
        >>> import vlattn_fast as va
        >>> va.methods.InputGradient(baseline="blur")  # pass it as va.explain(..., method=...)
        <method input_gradient(baseline=blur)>
    """

    name = "input_gradient"
    default_freeze: ClassVar[tuple[str, ...]] = FREEZABLE


class Absolute(InputGradient):
    """Takes the absolute value of sum_c x_c g_c: how much a token matters, for or against (Denil et al. 2015).

    arXiv 1412.6815.
    """

    name = "input_gradient:absolute"
    default_freeze = ()

    def combine(self, products: Tensor, dim: int) -> Tensor:
        return products.sum(dim).abs()


class Norm(InputGradient):
    """Takes the Euclidean norm of x_c g_c over the features c (Atanasova et al. 2020).

    arXiv 2009.13295 compares it with the mean.
    """

    name = "input_gradient:norm"
    default_freeze = ()

    def combine(self, products: Tensor, dim: int) -> Tensor:
        return products.norm(dim=dim)
