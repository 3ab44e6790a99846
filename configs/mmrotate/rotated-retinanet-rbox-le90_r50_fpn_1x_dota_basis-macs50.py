_base_ = 'mmrotate::rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py'  # noqa

custom_imports = dict(imports=['mmbasis'], allow_failed_imports=False)
load_from = 'https://mmassets.onedl.ai/mmrotate/v0.1.0/rotated_retinanet/rotated_retinanet_obb_r50_fpn_1x_dota_le90/rotated_retinanet_obb_r50_fpn_1x_dota_le90-c0097bc4.pth'  # noqa

custom_hooks = [
    dict(
        type='mmbasis.BasisCompressionHook',
        planner=dict(type='BudgetPlanner', macs=0.5),
        # 32 images
        calibration=dict(num_batches=16))
]

# the weights above are those of the whole detector
model = dict(backbone=dict(init_cfg=None))
# a tenth of the learning rate that the detector was trained with
optim_wrapper = dict(optimizer=dict(lr=0.00025))
