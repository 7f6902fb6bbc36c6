"""Benchmarks of whole tasks; `tests/test_benchmarks.py` of the core runs each of them at tiny sizes."""

from __future__ import annotations

import torch

from vlattn_lab.timed import task_explain_models


def test_a_model_is_made_on_its_device(monkeypatch):
    whole = task_explain_models.CLIP._replace(make=lambda sizes: torch.nn.Linear(sizes["C"], 1))
    monkeypatch.setattr(task_explain_models, "lively", lambda model, device, dtype: model)
    assert task_explain_models._model(whole, {"C": 16}, torch.device("meta"), torch.float32).weight.is_meta
