_base_ = '../_base_/detectors/yolox_s_8xb8-300e_coco.py'

custom_hooks = _base_.custom_hooks + [
    dict(
        type='mmbasis.BasisCompressionHook',
        planner=dict(type='BudgetPlanner', macs=0.25),
        # 32 images
        calibration=dict(num_batches=4))
]
