"""An explanation for its reader: numbers, pictures, pages and tables.

In: relevancy rows, and the facts about their tokens.
Out: an `Explanation` and its files, figures and tables.
Imports: _ground.
"""
