"""The work folder of an unfinished conversion, and what makes resuming safe."""
