"""`prompt_maps`: which parts of a generated image attend to each word of the prompt.

In: a pipeline of diffusers and a prompt.
Out: `PromptMaps`.
Imports: nothing.
"""
