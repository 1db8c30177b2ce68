"""The optimizer step: the train state, the optimizer and the compiled function."""
