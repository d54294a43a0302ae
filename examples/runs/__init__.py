"""What programs share about a run: settings, data sets, progress, logs, studies, pictures."""
