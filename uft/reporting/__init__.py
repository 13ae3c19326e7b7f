"""What runs have written about themselves, as pages that open offline."""
