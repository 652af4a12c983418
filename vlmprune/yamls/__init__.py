"""YAML read safely, every mistake told with its line."""
