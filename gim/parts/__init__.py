"""What a model consists of and where it lies: found from the model alone, before any rule acts."""
