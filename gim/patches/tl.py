def is_one(model: object) -> bool:
    return any(cls.__module__.split(".")[0] == "transformer_lens" for cls in type(model).__mro__)
