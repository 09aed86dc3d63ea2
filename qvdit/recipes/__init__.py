"""Recipes: one YAML file a method. Read by :mod:`qvdit.method.recipe`."""
