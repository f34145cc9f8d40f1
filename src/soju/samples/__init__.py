"""Our own Korean–English samples; see README.md."""
