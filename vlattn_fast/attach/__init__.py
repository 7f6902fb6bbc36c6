"""Sees and replaces the attention of a foreign model.

In: a model.
Out: its attention calls, as tensors and masks, handed to the run that sees them.
Imports: ops, backends, _ground.
"""
