"""Benchmarks of fastrnn against other libraries: ``fastrnn compare``, also used by ``bench/``."""
