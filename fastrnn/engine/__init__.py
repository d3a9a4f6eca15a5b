"""Runs a call: checks it, chooses a backend, and runs stacked layers."""
