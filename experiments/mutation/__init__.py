"""Which mistakes in the code its tests notice."""
