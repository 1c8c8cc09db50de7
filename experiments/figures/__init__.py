"""Figures and tables beyond the report's."""
