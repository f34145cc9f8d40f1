"""The methods, each a story of numbered steps. Only here do the parts meet."""
