# Half the MACs, with the dense detector as teacher
_base_ = 'retinanet_r18_bccd.py'

# trained by retinanet_r18_bccd.py
load_from = '{{$MMBASIS_DATA:data}}/retinanet_r18_bccd.pth'

custom_hooks = [
    dict(
        type='mmbasis.BasisCompressionHook',
        planner=dict(type='BudgetPlanner', macs=0.5),
        # 96 images
        calibration=dict(num_batches=12))
]

# a tenth of the dense learning rate: compressed weights need no large steps
max_epochs, iterations = 10, 26  # an epoch: 205 images in batches of 8
optim_wrapper = dict(optimizer=dict(lr=0.0001))
param_scheduler = dict(
    _delete_=True,
    type='CosineAnnealingLR',
    eta_min=1e-6,
    begin=0,
    end=max_epochs * iterations,
    T_max=max_epochs * iterations,
    by_epoch=False)
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
