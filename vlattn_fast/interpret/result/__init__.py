"""What a user gets: `Explanation`, `LayerExplanation` with a map per layer or head, and `SideBySide`.

In: relevancy vectors, and metadata about their tokens.
Out: an `Explanation` and its files, figures and tables.
Imports: interpret.result.numbers, interpret.result.figures, _ground.
"""
