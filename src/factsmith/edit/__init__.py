"""Answer facts with a Delta: the editors, their settings and their closed forms.

The package can be called: `factsmith.edit(lm, facts, "memit", ...)` is
`factsmith.edit.methods.edit`. Python sets the attribute `factsmith.edit` to this package as soon as
any of its modules is imported, so the package stands in for the function of that name.
"""

import inspect
import sys
from types import ModuleType
from typing import Any


class _EditPackage(ModuleType):
    """A package that passes calls on to its function `edit`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from .methods import edit

        return edit(*arguments, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        from .methods import edit

        return inspect.signature(edit)


sys.modules[__name__].__class__ = _EditPackage
