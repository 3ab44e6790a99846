# RTMDet-tiny from scratch on blood cells: 26 s an epoch on two CPU cores
_base_ = [
    '../_base_/models/rtmdet_tiny.py',
    '../_base_/datasets/bccd_voc.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmbasis'], allow_failed_imports=False)

model = dict(bbox_head=dict(num_classes=3))

max_epochs, iterations = 55, 26  # an epoch: 205 images in batches of 8
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.001, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0, bias_decay_mult=0, bypass_duplicate=True))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min=5e-5,
        begin=0,
        end=max_epochs * iterations,
        T_max=max_epochs * iterations,
        by_epoch=False)
]
train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=11)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

default_hooks = dict(
    logger=dict(interval=iterations),
    checkpoint=dict(interval=5, max_keep_ckpts=3),
    # makes an interrupted and resumed run the same as an uninterrupted one
    epoch_seed=dict(type='mmbasis.EpochSeedHook'))
randomness = dict(seed=0)
auto_scale_lr = dict(base_batch_size=8)
