"""Results as people see them: tables, notebooks, pictures."""
