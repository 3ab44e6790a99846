# Copyright (c) mmbasis authors. All rights reserved.
from .budget import BudgetPlanner
from .calibration import (calibrate, count_images, evaluation, forward_batch,
                          input_samples, is_expansion, output_samples,
                          sum_of_products, tensor_outputs,
                          train_deterministically)
from .layers import LayerInfo, check_finite, find_layers
from .plan import CompressionPlan, DensePlan, LayerPlan
from .planners import (BasePlanner, EnergyPlanner, FixedPlanner, PlanFollower,
                       RatioPlanner)
from .sensitivity import UnknownLossError, record_gradients
from .targets import find_targets

__all__ = [
    'calibrate', 'count_images', 'evaluation', 'forward_batch',
    'input_samples', 'is_expansion', 'output_samples', 'sum_of_products',
    'LayerInfo', 'check_finite', 'find_layers', 'CompressionPlan', 'DensePlan',
    'LayerPlan', 'BasePlanner', 'BudgetPlanner', 'EnergyPlanner',
    'FixedPlanner', 'PlanFollower', 'tensor_outputs',
    'train_deterministically', 'RatioPlanner', 'UnknownLossError',
    'find_targets',
    'record_gradients'
]
