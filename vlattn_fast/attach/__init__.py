"""Sees and replaces the attention of a foreign model.

In: a model (nn.Module). Out: its attention calls, each as tensors and masks, or handed to who replaces them.
Imports ops and the ground, nothing of interpret.
"""
