"""What runs from the command line: `fastrnn info`, `fastrnn compare` and the character model."""
