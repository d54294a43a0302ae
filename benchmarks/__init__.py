"""Programs that print tables of ratios, measured in one run."""

import examples as examples  # a program that lacks a package says what to install, as there
