# Tayyab et al., ICIP 2021: the same energy in every layer, bases from the
# weights alone, batch normalisation between basis and coefficients,
# orthogonality as a penalty, 120 epochs.
_base_ = 'resnet56_cifar10.py'

# trained by resnet56_cifar10.py, or converted from the authors' weights by
# tools/model_converters/resnet56_cifar.py
load_from = '{{$MMBASIS_DATA:data}}/resnet56_cifar10.pth'

custom_hooks = [
    dict(
        type='mmbasis.BasisCompressionHook',
        planner=dict(type='EnergyPlanner', threshold=0.63),
        norm=True,
        orthogonality=dict(weight=0.001),
        distillation=False),
    dict(type='mmbasis.SpectrumHook'),
]

optim_wrapper = dict(optimizer=dict(lr=0.01, weight_decay=0.0005))
param_scheduler = dict(milestones=[30, 60, 90])
train_cfg = dict(max_epochs=120)
