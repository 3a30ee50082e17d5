"""Make the folder `kernels/` importable as `liger_trainer.kernels`.

The folder has no `__init__.py`: transformers imports an unrelated PyPI package named `kernels`, and
from the root of this repository a regular package of that name would shadow it. In a wheel the
folder lies inside `liger_trainer`, in a checkout (or an editable install) beside it.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(p) for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()][:1]
