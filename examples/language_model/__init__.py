"""A ternary language model: `python -m examples.language_model --help`."""
