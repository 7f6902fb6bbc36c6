"""Records of models whose towers attend to one another: cross-attention between image and text, and encoder-decoders."""

from __future__ import annotations

from vlattn_fast.interpret.records import Family, Tower

_LXMERT_TEXT = Tower("text", "lxmert", "encoder.layer", "cls", "bert_text", branch="attention.output.dense", stream="attention")
_LXMERT_VISION = Tower(
    "vision", "lxmert", "encoder.r_layers", "cls", "patches", branch="attention.output.dense", stream="attention"
)

LINKED: dict[str, Family] = {"LxmertForQuestionAnswering": Family((_LXMERT_TEXT, _LXMERT_VISION), "class", bimodal=True)}
