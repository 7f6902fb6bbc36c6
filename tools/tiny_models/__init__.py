"""What `va.explain` must equal: the published procedure on stored maps, for tiny models of any class of transformers.

Nothing of the package makes these maps and rows. Tests and `tools.model_classes` compare with them.

In: a class of transformers; a model and its inputs.
Out: a small random model of the class, inputs that it takes, stored maps and their rows.
Imports: vlattn_fast.interpret.adapters.
"""
