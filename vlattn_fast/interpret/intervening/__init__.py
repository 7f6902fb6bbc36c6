"""Attention that is changed while a model runs: edits, their first-order and true effects, and curves of these by layer.

In: a model, its inputs and edits or groups of tokens.
Out: a context with the edits, `HeadRecord`, `EdgeTable`, `FlowCurve`.
Imports: interpret.explaining, interpret.relevancy, interpret.adapters, interpret.result, attach, ops, backends, _ground.
"""
