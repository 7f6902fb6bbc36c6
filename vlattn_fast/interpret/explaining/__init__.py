"""`explain`, stage by stage.

In: a model, its inputs and what the caller asks.
Out: an `Explanation`.
Imports: interpret.relevancy, interpret.records, interpret.result, attach, backends.reference, _ground.
"""
