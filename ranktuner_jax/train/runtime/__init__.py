"""The runtime of a run: mesh, processes, signals and the compilation cache."""
