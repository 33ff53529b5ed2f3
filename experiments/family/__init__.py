"""All methods and decoders of the package on the demo, at one budget, on one sheet."""
