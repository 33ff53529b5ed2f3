"""Which model families are right here."""
