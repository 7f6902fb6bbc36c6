"""Records: what a forward pass of a model does not show, by the model's class.

In: a model or its inputs. Out: its record, which tokens are real, where patches lie.
Imports the ground alone.
"""
