"""What this code computed before it was rebuilt, frozen; ``freeze.py`` writes the data."""
