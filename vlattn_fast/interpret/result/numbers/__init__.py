"""The numbers of an explanation: its fields, its samples and words, its entries as a table, and its files of tensors.

In: relevancy vectors, and metadata about their tokens.
Out: `Explained`, the checked fields, and what figures and tables need of them.
Imports: _ground.
"""
