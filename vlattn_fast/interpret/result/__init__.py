"""What an explanation is to its reader: numbers, pictures, pages and tables.

In: relevancy rows with what their tokens are. Out: files, figures, tables.
Imports the ground alone.
"""
