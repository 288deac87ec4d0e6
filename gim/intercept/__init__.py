"""How rules get in: sessions, the function mode that is on while a model runs, and what it does at each operation."""
