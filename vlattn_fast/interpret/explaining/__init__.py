"""`explain`, stage by stage.

In: a model, its inputs and what the caller asks.
Out: an `Explanation`, a `LayerExplanation`, or `Sinks`.
Imports: interpret.relevancy, interpret.adapters, interpret.result, attach, _ground.
"""
