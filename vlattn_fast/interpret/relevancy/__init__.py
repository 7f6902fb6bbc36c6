"""Carries relevancy through a model.

In: a model, its adapter and a method.
Out: a trace of its towers, and the relevancy vector of each tower after a backward pass.
Imports: interpret.relevancy.tracking, interpret.adapters, attach.recurrences, attach, ops, backends, scores, _ground.
"""
