"""Trains an image classifier: `python -m examples.train --help`."""
