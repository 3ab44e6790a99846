# Copyright (c) mmbasis authors. All rights reserved.
"""Planning: layers, what is measured of them, and what becomes of them."""
from .budget import BudgetPlanner
from .costs import Costs, Form, Ranks
from .latency_table import LatencyTable, refine
from .layers import (
    Exclusion,
    Layer,
    Reason,
    Rules,
    Selection,
    check_finite,
    find_layers,
)
from .plan import CompressionPlan, DensePlan, LayerPlan
from .planners import BasePlanner, EnergyPlanner, FixedPlanner, RatioPlanner
from .sensitivity import measure_sensitivity
from .statistics import Analysis, LayerStatistics, measure, with_columns

__all__ = [
    'BudgetPlanner', 'Costs', 'Form', 'LatencyTable', 'Exclusion', 'Layer',
    'Reason', 'check_finite', 'find_layers', 'CompressionPlan', 'DensePlan',
    'LayerPlan', 'BasePlanner', 'EnergyPlanner', 'FixedPlanner',
    'Ranks', 'RatioPlanner', 'Rules', 'Selection', 'measure_sensitivity',
    'Analysis', 'LayerStatistics', 'measure', 'refine', 'with_columns'
]
