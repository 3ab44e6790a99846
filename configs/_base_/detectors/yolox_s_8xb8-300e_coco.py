_base_ = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'

custom_imports = dict(imports=['mmbasis'], allow_failed_imports=False)
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/yolox/yolox_s_8x8_300e_coco/yolox_s_8x8_300e_coco_20211121_095711-4592a793.pth'  # noqa

# a tenth of the learning rate that the detector was trained with, 12 epochs,
# the last two without mosaics
max_epochs, last_epochs, base_lr = 12, 2, 0.001
optim_wrapper = dict(optimizer=dict(lr=base_lr))
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    dict(
        type='mmdet.QuadraticWarmupLR',
        by_epoch=True,
        begin=0,
        end=1,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=base_lr * 0.05,
        begin=1,
        T_max=max_epochs - last_epochs,
        end=max_epochs - last_epochs,
        by_epoch=True,
        convert_to_iter_based=True),
    dict(
        type='ConstantLR',
        by_epoch=True,
        factor=1,
        begin=max_epochs - last_epochs,
        end=max_epochs)
]
default_hooks = dict(checkpoint=dict(interval=1))
custom_hooks = [
    dict(hook, num_last_epochs=last_epochs)
    if hook['type'] == 'YOLOXModeSwitchHook' else hook
    for hook in _base_.custom_hooks
]
