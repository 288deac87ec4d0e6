"""What a model consists of, found once and frozen."""
