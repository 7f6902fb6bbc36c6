"""`widget`: an interactive view of a model, whose heads and edges you edit by clicks.

In: models, an input and groups of its tokens.
Out: a widget for notebooks, and the same as a page.
Imports: interpret.intervening, interpret.explaining, interpret.relevancy, interpret.adapters, interpret.result, attach, _ground.
"""
