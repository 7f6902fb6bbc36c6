"""Method "input_gradient": a token's embedding times the score's gradient there (Shrikumar et al. 2016, arXiv 1605.01713).

With a baseline the embedding is less the baseline's, as in the first step of DeepLIFT and of integrated gradients.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlattn_fast.interpret.relevancy.embedding_method import EmbeddingMethod
from vlattn_fast.interpret.relevancy.method import FREEZABLE


class InputGradient(EmbeddingMethod):
    """sum_c x_c g_c, with its sign: a token below zero lowers the score, to first order (Shrikumar et al. 2016).

    Embeddings are what enters the first layer of a tower. Methods that read them take every model, with any attention or none; in
    a model without an adapter each input is a tower with its name.
    """

    name = "input_gradient"
    default_freeze: ClassVar[tuple[str, ...]] = FREEZABLE


class Absolute(InputGradient):
    """The absolute value of sum_c x_c g_c: how much a token matters, for or against (Denil et al. 2015).

    arXiv 1412.6815.
    """

    name = "input_gradient:absolute"
    default_freeze = ()

    def combine(self, products: Tensor, dim: int) -> Tensor:
        return products.sum(dim).abs()


class Norm(InputGradient):
    """The Euclidean norm of x_c g_c over the features c (Atanasova et al. 2020).

    arXiv 2009.13295, which compares it with the mean.
    """

    name = "input_gradient:norm"
    default_freeze = ()

    def combine(self, products: Tensor, dim: int) -> Tensor:
        return products.norm(dim=dim)
