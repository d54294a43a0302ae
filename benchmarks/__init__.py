"""Programs that print tables of ratios, measured in one run."""
