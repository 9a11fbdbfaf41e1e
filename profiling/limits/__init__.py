"""How much the software stands: kills, faults of the file system, damaged files, odd inputs, each tried many times."""
