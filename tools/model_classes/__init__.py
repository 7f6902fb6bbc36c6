"""A tiny random model of each class in transformers' mappings, explained as it is, beside stored maps.

In: names of mappings and of model types.
Out: table.json, edits.json and held.json: of each class, whether `va.explain` and `va.intervene` give what they must.
Imports: tools.tiny_models.
"""
