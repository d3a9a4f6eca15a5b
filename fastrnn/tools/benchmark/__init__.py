"""``fastrnn compare`` and what ``bench/`` measures with: fastrnn beside other libraries."""
