"""Word alignment: which word of one language translates which word of the other."""
