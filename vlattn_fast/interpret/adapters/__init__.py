"""Adapters: what a forward pass does not show, by the model's class.

In: a model, or its config and inputs.
Out: its adapter: which tokens are real, words or patches, which position and which score are explained.
Imports: _ground.
"""
