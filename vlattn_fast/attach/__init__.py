"""Observes and replaces the attention of a foreign model.

In: a model.
Out: its attention calls, as tensors and masks, handed to subscribers.
Imports: ops, backends, _ground.
"""
