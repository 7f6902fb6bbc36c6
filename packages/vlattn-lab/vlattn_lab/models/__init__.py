"""`make models`: a tiny random model of each class in transformers' mappings, explained as it is, beside stored maps."""
