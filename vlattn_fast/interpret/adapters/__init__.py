"""Adapters: what a forward pass does not show, by the model's class.

In: a model, or its config and inputs.
Out: its adapter: which tokens are real, words or patches, which row is read, which score is explained.
Imports: _ground.
"""
