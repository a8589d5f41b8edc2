"""Can not be imported."""

raise RuntimeError("no luck\ntoday")
