"""One file for each front end: how its models are told, called, and where their ids become embeddings."""
