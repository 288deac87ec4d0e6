"""How rules get into a model, and the proof that none of its parts was left out."""
