"""What a model consists of, how it is called and where it lies: found from the model alone, before any rule acts."""
