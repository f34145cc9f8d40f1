"""Read rows from files, refuse the broken ones with place and remedy, count what was read."""
