"""Block-sparse attention (LServe) and sparsity-aware KV caching (ALISA) for PyTorch.

`lserve_ext.ops` wraps the kernels behind `torch.ops.lserve_ext`; `SparseConfig` says what is attended; `SparseCache`
and `attn_implementation="lserve"` put both under transformers (the extra `hf`).
"""

from importlib.metadata import version as _version
from importlib.util import find_spec as _find_spec
from typing import Any

if _find_spec(f"{__name__}._C") is None:
    raise ImportError(
        f"lserve_ext in {__path__[0]} is a source tree whose kernels are not compiled: run `python setup.py build_ext "
        "--inplace` there, or leave that folder, so that the installed package is imported"
    )

from . import ops
from .cache import LayerCache
from .config import SparseConfig
from .heads import HeadPattern
from .ops import PagedKV

__version__ = _version("lserve-ext")
__all__ = ["HeadPattern", "LayerCache", "PagedKV", "SparseCache", "SparseConfig", "__version__", "ops"]

# With transformers installed, importing this package is enough for attn_implementation="lserve".
try:
    from .hf import SparseCache
except ImportError as error:
    _reason = str(error)

    def __getattr__(name: str) -> Any:
        if name == "SparseCache":
            raise ImportError(f"SparseCache needs transformers, pip install 'lserve-ext[hf]': {_reason}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
