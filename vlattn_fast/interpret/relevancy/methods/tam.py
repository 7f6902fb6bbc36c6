"""Method "tam": the token activation map of a decoder's word (Li et al. 2025, arXiv 2506.23270), without a gradient.

It follows the authors' code (github.com/xmed-lab/TAM). z_i[c] is the logit of token c at position i; c is the token explained:

- The activation of position i is max(z_i[c], 0), up to the position that predicts c.
- Estimated causal inference: earlier words interfere. Word j, token c_j, has the map M_j = max(z_i[c_j], 0) over the image and
  the weight w_j = max(z_k[c], 0) / sum, where k is the position of a word of the prompt, and the one that predicts a word of the
  answer. Words of the same token are left out. The image keeps max(M - a sum_j w_j M_j, 0) of its activation M, where a is the
  least-squares scale of both maps.
- A rank Gaussian filter takes outliers out of each map of the image (`result.numbers.interference`).

Two things differ. The first word of a prompt has the map of its own token, as all others have; the code takes the likeliest
token after it. The code scales image and words together to 0 to 1 before the filter, and these values are raw: the filter gives
the same, up to this scale, if some entry is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlattn_fast.interpret.adapters.adapter import Adapter, Tower
from vlattn_fast.interpret.relevancy.method import BackwardPass, Method
from vlattn_fast.interpret.result.numbers.interference import rest_of_map


class Tam(Method):
    """Takes a decoder's logit of one token c at each position i: max(z_i[c], 0), less earlier words' maps (Li et al. 2025).

    It costs one forward pass, with the logits of all positions. It only supports decoders with the image in their own sequence,
    and explains one token at a time (arXiv 2506.23270).

    Examples:
        >>> import vlattn_fast as va
        >>> va.methods.Tam()  # pass it as va.explain(..., method=...)
        <method tam>
    """

    name = "tam"
    needs = "embeddings"  # it needs no attention
    needs_score = False
    takes_logits = True
    rank_filter = True

    def check_adapter(self, adapter: Adapter, model: str) -> None:
        if not adapter.scoring.predicts or adapter.bimodal or not adapter.towers:
            raise ValueError(
                "model must be a decoder that predicts the next token, with the image in its own sequence, for method 'tam'; got "
                f"{model}"
            )

    def check_between(self, entries: Sequence[Tower | None]) -> None:
        raise ValueError("method='tam' does not support towers that attend to one another. Pass another method=")

    def __init__(self) -> None:
        super().__init__()

    @torch.no_grad()
    def carry(self, backward: BackwardPass) -> list[Tensor]:
        (tower,), (start,), predicted = backward.towers, backward.starts, backward.predicted
        if predicted is None:
            raise ValueError(
                "target must be None, tokens or words, or answer be given with per_token=True, for method 'tam', which explains "
                "one token; got a callable or per_token=False"
            )
        logits, tokens = predicted.logits, tower.tokens_in(backward.arguments)
        if logits.ndim != 3 or tuple(logits.shape[:2]) != tower.shape or tokens.ids is None:
            got = f"logits {tuple(logits.shape)} and {tower.size} tokens of tower '{tower.name}'"
            raise ValueError(f"model must give logits at each token of its sequence for method 'tam'; got {got}")
        device, count = logits.device, predicted.number
        ids = torch.nn.functional.pad(tokens.ids, (tokens.before, 0)).to(device)
        real, words = tokens.real(), tokens.words()
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.to(device)
        words = torch.zeros_like(real) if words is None else words.to(device)
        image, column = tokens.image_mask().to(device) & real, torch.arange(ids.shape[1], device=device)
        rows = torch.zeros(start.shape[0], ids.shape[1], dtype=start.dtype, device=device)
        for sample, positions in enumerate(predicted.positions.to(device)):
            if not bool(start[sample].any()):  # after the end of a shorter answer
                continue
            token, position = predicted.ids[sample][count], positions[count]
            activation = logits[sample, :, token].to(rows).clamp(min=0)
            rows[sample] = activation.masked_fill(~real[sample] | (column > position), 0.0)
            # The words before the token that is explained: those of the prompt, then those of the answer.
            asked = (words[sample] & (column <= positions[0])).nonzero()[:, 0]
            earlier = torch.cat([ids[sample, asked], torch.tensor(predicted.ids[sample][:count], dtype=ids.dtype, device=device)])
            weights = activation[torch.cat([asked, positions[:count]])]
            counts, patches = earlier != token, image[sample].nonzero()[:, 0]
            if bool(counts.any()) and len(patches):
                maps = logits[sample, patches][:, earlier[counts]].to(rows).clamp(min=0).T
                rows[sample, patches] = rest_of_map(rows[sample, patches], maps, weights[counts])
        return [rows[:, None]]
