"""`evaluate`: the quality of maps. `token_grounding`: which words of an answer rest on the image.

In: a model, and a data set of inputs, targets and boxes, or an input and an answer.
Out: an `Evaluation`: a table and curves; a `TokenGrounding`.
Imports: interpret.intervening, interpret.explaining, interpret.relevancy, interpret.adapters, interpret.result, ops, attach,
    _ground.
"""
