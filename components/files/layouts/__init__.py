"""Names and files of other programs: key mappings as data, in both directions."""
