"""The public services, one module each: resource names in, one call of the core, converted answer out."""
