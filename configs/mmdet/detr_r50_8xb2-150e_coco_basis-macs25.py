_base_ = '../_base_/detectors/detr_r50_8xb2-150e_coco.py'

custom_hooks = [
    dict(
        type='mmbasis.BasisCompressionHook',
        planner=dict(type='BudgetPlanner', macs=0.25),
        # 32 images
        calibration=dict(num_batches=16))
]
