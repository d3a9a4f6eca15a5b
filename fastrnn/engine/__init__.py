"""From a call to its results: checks, the choice of a backend, stacks of layers."""
