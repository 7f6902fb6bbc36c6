"""Records of models whose towers attend to one another: cross-attention between image and text, and encoder-decoders."""

from __future__ import annotations

from dataclasses import replace

from vlattn_fast.interpret.records import Family, Tower

_TEXT = Tower("text", "lxmert", "encoder.layer", "cls", "bert_text")
_REGIONS = Tower("vision", "lxmert", "encoder.r_layers", "cls", "boxes")
_LXMERT = Family((_TEXT, _REGIONS), "class", bimodal=True, logits="question_answering_score")

LINKED: dict[str, Family] = {
    "LxmertForQuestionAnswering": _LXMERT,
    "LxmertForPreTraining": _LXMERT,
    "LxmertModel": replace(_LXMERT, towers=(replace(_TEXT, path=""), replace(_REGIONS, path=""))),
}
