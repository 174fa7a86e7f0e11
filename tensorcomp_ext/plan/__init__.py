"""How a layer is executed here: candidates, cost model, tuner, choices.

A plan is one file with a class under ``@register_plan``; layers know plans only by name.
"""

from .base import Candidate, Plan, Stage, get_plan, plans_for, register_plan
from .candidates import CandidateList
from .case import Case
from .choices import export_choices, import_choices
from .embedding_geometry import EmbeddingGeometry
from .geometry import ConvGeometry, Geometry, LinearGeometry
from .layer import PlannedLayer

# Candidates are offered in the order of registration, dense first.
from .dense import Dense  # isort: skip
from .packed import Packed  # isort: skip
from .staged import Staged  # isort: skip
from .merged import Merged  # isort: skip
from .fused import Fused  # isort: skip
from .pair import Pair  # isort: skip
from .partial import Partial  # isort: skip
from .timing import time_interleaved
from .tuner import tune
from .tuning import LayerTuning, Timing, TuneResult

__all__ = [
    "Candidate",
    "CandidateList",
    "Case",
    "ConvGeometry",
    "Dense",
    "EmbeddingGeometry",
    "Fused",
    "Geometry",
    "LayerTuning",
    "LinearGeometry",
    "Merged",
    "Packed",
    "Pair",
    "Partial",
    "Plan",
    "PlannedLayer",
    "Stage",
    "Staged",
    "Timing",
    "TuneResult",
    "export_choices",
    "get_plan",
    "import_choices",
    "plans_for",
    "register_plan",
    "time_interleaved",
    "tune",
]
