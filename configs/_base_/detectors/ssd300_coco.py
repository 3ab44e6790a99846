_base_ = 'mmdet::ssd/ssd300_coco.py'

custom_imports = dict(imports=['mmbasis'], allow_failed_imports=False)
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/ssd/ssd300_coco/ssd300_coco_20210803_015428-d231a06e.pth'  # noqa

# a tenth of the learning rate that the detector was trained with, 12 epochs
# (of all images five times)
optim_wrapper = dict(optimizer=dict(lr=0.0002))
train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(
        type='MultiStepLR',
        begin=0,
        end=12,
        by_epoch=True,
        milestones=[8, 11],
        gamma=0.1)
]
