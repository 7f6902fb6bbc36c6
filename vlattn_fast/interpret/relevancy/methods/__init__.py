"""The methods of `explain`, one file each.

In: the attention calls of a forward pass, and the start of a backward pass.
Out: the relevancy vectors of each tower.
Imports: interpret.relevancy, interpret.adapters, interpret.result.numbers, attach, ops, backends.reference, _ground.
"""
