_base_ = '../_base_/detectors/ssd300_coco.py'

custom_hooks = _base_.custom_hooks + [
    dict(
        type='mmbasis.BasisCompressionHook',
        planner=dict(type='BudgetPlanner', macs=0.5),
        # 32 images
        calibration=dict(num_batches=4))
]
