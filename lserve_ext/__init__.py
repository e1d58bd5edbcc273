"""Block-sparse attention (LServe) and sparsity-aware KV caching (ALISA) for PyTorch.

`lserve_ext.ops` wraps the kernels behind `torch.ops.lserve_ext`; `SparseConfig` says what is attended; `SparseCache`
and `attn_implementation="lserve"` put both under transformers (the extra `hf`).
"""

from importlib.metadata import version as _version
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING, Any

from . import ops
from .cache import LayerCache
from .config import SparseConfig
from .heads import HeadPattern
from .ops import PagedKV

__version__ = _version("lserve-ext")
__all__ = ["HeadPattern", "LayerCache", "PagedKV", "SparseCache", "SparseConfig", "__version__", "ops"]

# With transformers installed, importing this package is enough for attn_implementation="lserve".
if TYPE_CHECKING or _find_spec("transformers") is not None:
    from .hf import SparseCache
else:

    def __getattr__(name: str) -> Any:
        if name == "SparseCache":
            raise ImportError("lserve_ext.SparseCache needs transformers: pip install 'lserve-ext[hf]'")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
