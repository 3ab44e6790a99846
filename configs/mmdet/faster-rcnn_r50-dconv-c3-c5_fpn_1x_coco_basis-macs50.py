_base_ = '../_base_/detectors/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py'

custom_hooks = [
    dict(
        type='mmbasis.BasisCompressionHook',
        planner=dict(type='BudgetPlanner', macs=0.5),
        # 32 images
        calibration=dict(num_batches=16))
]
