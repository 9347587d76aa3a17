"""What a run needs of memory, and what is chosen so that it fits."""
