"""Follows a run: tokens that a model moves, the calls that a tensor is computed from, the modules that run.

In: the calls of torch and of modules in a forward pass.
Out: the positions of tokens, records of tensors.
Imports: _ground.
"""
