"""Benchmarks of the losses, the model, the input pipeline and whole training steps."""
