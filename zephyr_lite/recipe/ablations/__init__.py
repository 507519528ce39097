"""The seeds' ablations: several ways through the recipe on one base, compared in one table."""
