"""The ground: argument checks, helpers on tensors, optional packages, the sine series. Imports nothing of the package."""
