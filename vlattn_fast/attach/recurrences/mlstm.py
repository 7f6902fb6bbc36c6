"""mLSTM, the recurrence of xLSTM (Beck et al., arXiv 2405.04517): linear attention with an exponential input gate, a forget gate,
and a denominator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast.attach.recurrences.chunks import recurred
from vlattn_fast.attach.recurrences.reading import GOES_ON, FunctionCall, Reading, Recurrence


def read(call: FunctionCall) -> Reading:
    """Query, key and value are (B, H, N, D), the gates before their activations (B, H, N).

    C_t = f_t C_{t-1} + i_t k_t v_t^T and n_t = f_t n_{t-1} + i_t k_t, and h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + eps),
    both with states divided by exp(m_t), the largest gate of a token so far.
    """
    value: Tensor = call["value"]
    config: Any = call.module.config
    forget, gate = (call[name].double() for name in ("fgate", "igate"))
    forget = functional.logsigmoid(forget)
    since_start = forget.cumsum(-1)
    largest = since_start + (gate - since_start).cummax(-1).values.clamp(min=0)  # m_t = max(log f_t + m_{t-1}, i_t), m_0 = 0
    log_decay = forget + functional.pad(largest, (1, -1)) - largest
    query = call["query"].double() * call["query"].shape[-1] ** -0.5
    key = call["key"].double() * (gate - largest).exp()[..., None]
    normalizers = recurred(query, key, torch.ones_like(key[..., :1]), log_decay)[..., 0]
    below = torch.maximum(normalizers.abs(), (-largest).exp()) + config.eps
    as_double = value.dtype == torch.float64
    query, key, log_decay = (x if as_double else x.float() for x in (query / below[..., None], key, log_decay))
    return Reading(
        Recurrence(query, key, value, log_decay),
        run=lambda value: call.run(value=value),
        unsupported="" if call["c_initial"] is None else GOES_ON,
    )


CLASSES = {"xLSTMBackend": read}
