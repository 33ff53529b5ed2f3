"""What holds a policy back: towers of several sizes beside one reference."""
