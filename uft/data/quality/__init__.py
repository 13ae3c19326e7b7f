"""What is in the feedback: counts, duplicates, contamination, biases, contradictions."""
