"""The numbers of an explanation: its fields, its samples and words, its entries as a table, and its files of tensors.

In: relevancy rows, and the facts about their tokens.
Out: `Explained`, the checked fields, and what pictures and tables read of them.
Imports: _ground.
"""
