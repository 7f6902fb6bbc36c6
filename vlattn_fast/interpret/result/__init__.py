"""An explanation for its reader: `Explanation`, that of each layer, and several side by side.

In: relevancy rows, and the facts about their tokens.
Out: an `Explanation` and its files, figures and tables.
Imports: interpret.result.numbers, interpret.result.pictures, _ground.
"""
