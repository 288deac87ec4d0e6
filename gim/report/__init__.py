"""Results to look at. Nothing here is imported before something is drawn."""
