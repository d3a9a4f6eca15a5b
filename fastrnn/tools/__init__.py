"""Command line tools: `fastrnn info`, `fastrnn compare` and the character model."""
