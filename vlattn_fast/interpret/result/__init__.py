"""What an explanation is to its reader: numbers, pictures, pages and tables.

In: relevancy rows, and what their tokens are.
Out: an `Explanation` and its files, figures and tables.
Imports: _ground.
"""
