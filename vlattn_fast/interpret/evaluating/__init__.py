"""`evaluate`: the quality of maps.

In: a model, and a data set of inputs, targets and boxes.
Out: an `Evaluation`: a table and curves.
Imports: interpret.intervening, interpret.explaining, interpret.relevancy, interpret.adapters, interpret.result, attach, _ground.
"""
