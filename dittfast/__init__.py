"""dittfast: faster diffusion transformers inside diffusers pipelines."""

from pathlib import Path as _Path

# The code folders kernels/, pipelines/, distill/, configs/ and samples/ stand beside this one in
# the repository and inside it once installed. From a checkout, let `dittfast.kernels` find them.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "setup.cfg").is_file():
    __path__.append(str(_here.parent))

__version__ = "0.1.0"
