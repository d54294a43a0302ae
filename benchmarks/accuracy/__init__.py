"""Methods × sets × seeds on CIFAR-10: `python -m benchmarks.accuracy`."""
