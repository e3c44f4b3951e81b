"""Decides and orchestrates: families, plan, conversion, verification, the command line."""
