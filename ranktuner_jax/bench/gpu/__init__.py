"""`ranktuner bench gpu`: what we want to know of a GPU, in parts that each run by themselves."""
