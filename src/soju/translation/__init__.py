"""Recipe ``translation``: a large Korean–English encoder–decoder becomes a small quantised one."""
