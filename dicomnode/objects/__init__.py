"""Objects that other programs read: ITK transforms."""
