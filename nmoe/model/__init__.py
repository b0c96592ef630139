"""The transformer's parts, each a module whose parameters bear the registry's names."""
