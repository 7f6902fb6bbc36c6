"""RWKV-4 (Peng et al., arXiv 2305.13048): each channel is a head whose weights fall with distance, but for the token's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast.attach.recurrences.chunks import recurred
from vlattn_fast.attach.recurrences.reading import FunctionCall, Reading, Recurrence, at_least_float32

_CHUNK = 16  # a chunk's map is one of each channel


def read(call: FunctionCall) -> Reading:
    """Key and value are (B, N, C), time_decay and time_first (C). With w = exp(time_decay) and u = time_first

    o_t = (sum_{s < t} exp(-(t - 1 - s) w + k_s) v_s + exp(u + k_t) v_t) / (the same sum without values).

    States are those of the tokens before, divided by exp(m_t), the largest weight of a token so far.
    """
    value: Tensor = call["value"].transpose(1, 2)[..., None]
    key = call["key"].double().transpose(1, 2)
    speed, first = (call[name].double()[:, None] for name in ("time_decay", "time_first"))
    speed = speed.exp()
    since_start = speed * torch.arange(key.shape[-1], device=key.device)
    largest = (key + since_start).cummax(-1).values - since_start  # m_t = max(m_{t-1} - w, k_t)
    before = functional.pad(largest, (1, -1), value=-torch.inf)  # m_{t-1}
    log_decay = (before - speed - largest).nan_to_num(neginf=0.0)  # nothing is in front of the first token
    written = (key - largest).exp()[..., None]
    sums = recurred(torch.ones_like(written), written, torch.ones_like(written), log_decay, _CHUNK)[..., 0]
    top = torch.maximum(before, first + key)
    earlier, itself = (before - top).exp(), (first + key - top).exp()
    below = earlier * functional.pad(sums, (1, -1)) + itself
    query, written, log_decay, diagonal = (
        x.to(at_least_float32(value).dtype) for x in ((earlier / below)[..., None], written, log_decay, itself / below)
    )
    state = call["state"]
    return Reading(
        Recurrence(query, written, value, log_decay, diagonal=diagonal, reads_before=True),
        run=lambda value: call.run(value=value[..., 0].transpose(1, 2)),
        output_of=lambda result: result[0].transpose(1, 2)[..., None],
        with_output=lambda result, output: (output[..., 0].transpose(1, 2), *result[1:]),
        refusal=""
        if state is None
        else "goes on from the state of an earlier pass. Pass the whole sequence in one forward pass, without a cache",
    )


FUNCTIONS = {"rwkv_linear_attention": read}
