"""Inputs made on the spot from Debian's archive, named and shaped as the real ones are."""
