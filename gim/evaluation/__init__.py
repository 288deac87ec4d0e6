"""Does an attribution tell the truth? What a model says where the tokens that a method points at are replaced."""
