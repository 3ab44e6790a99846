_base_ = '../_base_/detectors/fcos_r50-caffe_fpn_gn-head_1x_coco.py'

custom_hooks = [
    dict(
        type='mmbasis.BasisCompressionHook',
        planner=dict(type='BudgetPlanner', macs=0.25),
        # 32 images
        calibration=dict(num_batches=16))
]
