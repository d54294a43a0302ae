"""What programs share about a run: its log, checkpoints, progress, report and pictures."""
