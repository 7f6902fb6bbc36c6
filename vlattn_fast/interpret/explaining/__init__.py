"""`explain`, stage by stage.

In: a model, its inputs and what the caller asks. Out: an Explanation.
Imports relevancy, records, result and attach.
"""
