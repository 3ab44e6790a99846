# Copyright (c) mmbasis authors. All rights reserved.
from .budget import BudgetPlanner
from .calibration import (calibrate, input_samples, is_expansion,
                          output_samples, sum_of_products)
from .layers import LayerInfo, check_finite, find_layers
from .plan import CompressionPlan, DensePlan, LayerPlan
from .planners import (BasePlanner, EnergyPlanner, FixedPlanner, PlanFollower,
                       RatioPlanner)
from .sensitivity import record_gradients

__all__ = [
    'calibrate', 'input_samples', 'is_expansion', 'output_samples',
    'sum_of_products', 'LayerInfo', 'check_finite', 'find_layers',
    'CompressionPlan', 'DensePlan', 'LayerPlan', 'BasePlanner',
    'BudgetPlanner', 'EnergyPlanner', 'FixedPlanner', 'PlanFollower',
    'RatioPlanner', 'record_gradients'
]
