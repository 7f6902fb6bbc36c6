"""Edits of a model's attention while it runs, their first-order and true effects, and curves of effects by layer.

In: a model, its inputs and edits or groups of tokens.
Out: a context with the edits, `HeadRecord`, `EdgeTable`, `FlowCurve`.
Imports: interpret.explaining, interpret.relevancy, interpret.adapters, interpret.result, attach, ops, backends, _ground.
"""
