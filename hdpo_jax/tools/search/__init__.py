"""Where searches look: indices on this machine, caches that come with data sets, providers on the web."""
