"""Measurements of the loss, the model, the input pipeline and whole training steps."""
