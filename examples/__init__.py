"""Programs over brelax_jax, run from the repository's root: `python -m examples.train --help`."""
