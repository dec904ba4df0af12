"""Long runs against a whole node: kills, power cuts, steady load."""
