_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'

custom_imports = dict(imports=['mmbasis'], allow_failed_imports=False)
load_from = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/pspnet/pspnet_r18-d8_512x1024_80k_cityscapes/pspnet_r18-d8_512x1024_80k_cityscapes_20201225_021458-09ffa746.pth'  # noqa

custom_hooks = [
    dict(
        type='mmbasis.BasisCompressionHook',
        planner=dict(type='BudgetPlanner', macs=0.5),
        # 32 images
        calibration=dict(num_batches=16))
]

# the weights above are those of the whole segmentor
model = dict(pretrained=None)
# a tenth of the learning rate and of the iterations that it was trained with
optim_wrapper = dict(optimizer=dict(lr=0.001))
param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=1e-5,
        power=0.9,
        begin=0,
        end=8000,
        by_epoch=False)
]
train_cfg = dict(max_iters=8000, val_interval=2000)
