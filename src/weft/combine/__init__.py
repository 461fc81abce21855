"""Rules that make one tensor of several: one file, one rule. They see tensors alone, never files or models.

Importing this room registers every rule.
"""

from importlib import import_module
from pkgutil import iter_modules

from weft.combine.rule import Rule, RuleError, rules

__all__ = ["Rule", "RuleError", "rules"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
