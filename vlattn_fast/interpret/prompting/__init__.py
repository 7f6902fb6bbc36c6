"""`prompt_maps`: which parts of a generated image attend to each word of the prompt.

In: a pipeline and a prompt.
Out: `PromptMaps`.
Imports: interpret.adapters, interpret.result, attach, ops, _ground.
"""
