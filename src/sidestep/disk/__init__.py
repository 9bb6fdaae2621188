"""Files: written whole or not at all, and the forms of tasks and tables. Knows no model."""
