"""Measurements by the real clock. Never draws."""
