"""Method "integrated_gradients" (Sundararajan, Taly, Yan, ICML 2017, equation 1), from embeddings of zero."""

from __future__ import annotations

from vlattn_fast.interpret.relevancy.embedding_method import EmbeddingMethod


class IntegratedGradients(EmbeddingMethod):
    """sum_c x_c g_c, g the mean over `steps` embeddings alpha x with alpha from 0 to 1 (Sundararajan et al. 2017).

    It is x . integral over alpha of the gradient at alpha x, by the midpoint rule: alpha = (k + 1/2) / steps. The embeddings of
    all towers are scaled together, so all entries add up to the score's gain over that of zero embeddings, as the number of steps
    grows. Each step is a forward and a backward pass, of which only the sum of the rows is kept.
    """

    name = "integrated_gradients"
    default_steps = 32
