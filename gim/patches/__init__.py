"""How each part of a model is found, recognised by its behaviour, and given its backward rule."""
