"""Calibration prompts: text files, one prompt a line."""
