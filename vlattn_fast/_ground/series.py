"""Additive attention as a dot product: tanh(q + k) by sines, sin(w(q + k)) = sin(wq) cos(wk) + cos(wq) sin(wk)."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from vlattn_fast._ground.checks import is_traced_or_batched, readable

TERMS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def sine_series(query: Tensor, key: Tensor, vector: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Features phi (B, H, N, 2AT) and psi (B, Hkv, M, 2AT) with |phi . psi - u . tanh(q + k)| <= tolerance.

    query (B, H, N, A), key (B, Hkv, M, A), vector (H, A). float16 and bfloat16 inputs give float32 features: rounding to 16 bits
    would cost more accuracy than the series. Meta and fake tensors, which have no range, give features of the longest series.

    Raises:
        ValueError: no series reaches the tolerance on the range of the data (the message names the best); the data are not
            finite, or cannot be read (traced code, torch.func.vmap, CUDA graph capture).
    """
    if any([is_traced_or_batched(x) for x in (query, key, vector)]):
        raise ValueError(
            "Additive(method='series') reads the range of its data, which code that is traced (torch.compile, torch.jit.trace, "
            "make_fx) and torch.func.vmap do not have; use method='exact' there or call it outside"
        )
    if query.dtype in (torch.float16, torch.bfloat16):
        query, key, vector = query.float(), key.float(), vector.float()
    if readable(query):
        radius, weight = (
            _range(query.detach(), key.detach()),
            float(vector.detach().abs().sum(-1).max()) if vector.numel() else 0.0,
        )
        if not math.isfinite(radius * weight):
            raise ValueError(
                "query, key and vector must be finite for Additive(method='series'), which fits a series to their range"
            )
        frequencies, coefficients = _choose(radius, weight, tolerance, torch.finfo(query.dtype).eps)
    elif query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("Additive(method='series') reads the range of its data, which a CUDA graph cannot; use method='exact'")
    else:
        frequencies = coefficients = np.ones(TERMS[-1])
    omega = query.new_tensor(frequencies)
    amplitude = query.new_tensor(coefficients)
    angle_q, angle_k = query[..., None] * omega, key[..., None] * omega
    scaled = vector[:, None, :, None] * amplitude
    phi = torch.cat([(angle_q.sin() * scaled).flatten(-2), (angle_q.cos() * scaled).flatten(-2)], dim=-1)
    psi = torch.cat([angle_k.cos().flatten(-2), angle_k.sin().flatten(-2)], dim=-1)
    return phi, psi


def _range(query: Tensor, key: Tensor) -> float:
    """max |q_a + k_a| over all pairs, from the extremes of each hidden unit."""
    if query.numel() == 0 or key.numel() == 0:
        return 0.0
    over = (0, 1, 2)
    high = query.amax(over) + key.amax(over)
    low = query.amin(over) + key.amin(over)
    return float(torch.maximum(high.abs(), low.abs()).max())


def _choose(radius: float, weight: float, tolerance: float, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """The shortest series that keeps weight * (its error + rounding) within the tolerance on [-radius, radius]."""
    attainable = math.inf
    rounded = max(0.25, math.ceil(radius * 4) / 4)  # steps of 1/4: calls with similar ranges share a fit
    for terms in TERMS:
        frequencies, coefficients, error = fit(rounded, terms)
        reached = weight * (error + 4 * eps * float(np.abs(coefficients).sum()))
        if reached <= tolerance:
            return frequencies, coefficients
        attainable = min(attainable, reached)
    # 6 % more: rounding to two digits must not name an error out of reach
    raise ValueError(
        f"tolerance={tolerance:g} is out of reach for |Wq q + Wk k + b| up to {radius:.3g} and ||u||_1 = {weight:.3g}: "
        f"{1.06 * attainable:.2g} is attainable with up to {TERMS[-1]} sine terms; raise the tolerance or use method='exact'"
    )


@functools.lru_cache(maxsize=256)
def fit(radius: float, terms: int) -> tuple[np.ndarray, np.ndarray, float]:
    """tanh(x) on [-radius, radius] as sum_n c_n sin(w_n x): frequencies w, coefficients c, largest error.

    The frequencies are odd harmonics w_n = (2n + 1 + 2 bend n^2 / terms) pi / (2 stretch radius): their waves are flat near where
    tanh is flat. Bending the frequencies upwards gains about a digit. A search finds stretch and bend. A finer grid measures the
    error.
    """
    n = np.arange(terms)
    candidates = [
        (2 * n + 1 + 2 * bend * n * n / terms) * np.pi / (2 * radius * stretch)
        for stretch in (0.85, 0.9, 0.95, 1.0, 1.1, 1.25, 1.5)
        for bend in (0.0, 0.15, 0.3, 0.4, 0.5, 0.65)
    ]
    x = radius * np.sin(np.linspace(0, np.pi / 2, 16 * terms + 100))
    coarse = x[::4]  # ranks the candidates as well as x, and spares minutes for long series
    best = min(candidates, key=lambda frequencies: _minimax(coarse, frequencies, rounds=2)[1])
    coefficients, _ = _minimax(x, best, rounds=25)
    fine = np.linspace(0, radius, 400 * terms)
    error = np.abs(np.sin(np.outer(fine, best)) @ coefficients - np.tanh(fine)).max()
    return best, coefficients, float(error)


def _minimax(x: np.ndarray, frequencies: np.ndarray, rounds: int) -> tuple[np.ndarray, float]:
    """Least squares, reweighted towards the largest error (Lawson): the best coefficients and their largest error on x."""
    basis, target, weights = np.sin(np.outer(x, frequencies)), np.tanh(x), np.ones_like(x)
    best, smallest = np.zeros_like(frequencies), np.inf
    for _ in range(rounds):
        root = np.sqrt(weights)
        coefficients = np.linalg.lstsq(basis * root[:, None], target * root, rcond=1e-12)[0]
        residual = np.abs(basis @ coefficients - target)
        if residual.max() < smallest:
            best, smallest = coefficients, residual.max()
        weights = weights * (residual / max(residual.max(), 1e-300) + 1e-3)
        weights /= weights.mean()
    return best, float(smallest)
