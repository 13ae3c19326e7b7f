"""Sequential and unified training compared on a model and data of your own, and the statistics of it."""
