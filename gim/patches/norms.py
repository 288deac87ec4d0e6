from torch import nn
def looks_like_norm(module: nn.Module) -> bool:
    """Whether a module is a norm by type or name, or could be one by its parameters: a single vector ``weight``."""
    if any(True for _ in module.children()):
        return False
    if "norm" in type(module).__name__.lower():
        return True
    parameters = dict(module.named_parameters(recurse=False))
    return set(parameters) in ({"weight"}, {"weight", "bias"}) and all(p.dim() == 1 for p in parameters.values())


