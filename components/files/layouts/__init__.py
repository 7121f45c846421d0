"""Weight formats of other projects, with key mappings in both directions."""
