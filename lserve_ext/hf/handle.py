"""What stands where a tensor would, between two functions of ours that only transformers' model code lies between."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.utils._pytree import tree_leaves

NAME = "lserve"
WHO = f"attn_implementation={NAME!r}"


class Handle:
    """Stands where a tensor would, between two functions of ours: whoever else touches it gets a clear error."""

    def _refuse(self, touch: str) -> NoReturn:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        touched = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Handle))  # in a list, of torch.cat
        touched._refuse(getattr(func, "__name__", str(func)))


def _refused(name: str) -> Any:
    return lambda self, *_: self._refuse(name)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "and", "rand", "or", "ror",
              "invert", "neg", "lt", "le", "gt", "ge", "eq", "ne", "bool", "len", "iter", "getitem",
              "setitem"):  # fmt: skip
    setattr(Handle, f"__{_name}__", _refused(f"__{_name}__"))
Handle.__hash__ = object.__hash__  # type: ignore[method-assign]  # which __eq__ has taken away
