"""`prompt_maps`: where a diffusion model puts the words of its prompt.

In: a pipeline and a prompt.
Out: `PromptMaps`.
Imports: interpret.explaining, interpret.adapters, interpret.result, attach, ops, _ground.
"""
