"""Reports for people: what was measured of one model, and several models beside each other."""
