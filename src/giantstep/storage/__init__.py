"""Stores: names to bytes. A protocol with declared capabilities, and the stores that implement it."""
