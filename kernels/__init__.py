"""Attention backends behind :func:`dittfast.attend`: dense oracle, CPU, Triton."""

if __name__ == "kernels":
    # A shell standing in the repository root imports this folder when diffusers or transformers
    # asks for Hugging Face's `kernels` package. Hand them the real one. Where there is none, an
    # empty module without a file: transformers takes that for "not installed", but lets an
    # ImportError through and is then broken as a whole.
    import importlib.util as _util
    import sys as _sys
    from importlib.machinery import ModuleSpec as _ModuleSpec
    from importlib.machinery import PathFinder as _PathFinder
    from pathlib import Path as _Path

    _root = _Path(__file__).resolve().parent.parent
    _elsewhere = [p for p in _sys.path if _Path(p or ".").resolve() != _root]
    _spec = _PathFinder.find_spec("kernels", _elsewhere)
    if _spec is None or _spec.loader is None:
        _sys.modules["kernels"] = _util.module_from_spec(_ModuleSpec("kernels", None))
    else:
        _real = _util.module_from_spec(_spec)
        _sys.modules["kernels"] = _real
        _spec.loader.exec_module(_real)
