"""Commands of ``vbon`` beside Lightning's own."""
