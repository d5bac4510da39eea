"""Exports that other libraries load, and versions of a registered model."""
