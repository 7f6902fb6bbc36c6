"""The methods of `explain`, one file each.

In: the attention calls of a run, and what a backward pass starts from.
Out: the relevancy rows of each tower.
Imports: interpret.relevancy, interpret.adapters, interpret.result.numbers, attach, ops, backends.reference, _ground.
"""
