"""Gate, rollback and integrity: what may be kept, and what is run again."""
