# The last step before the export: the compressed network, fine-tuned further
# with what int8 can hold, and with the dense network as its teacher.
_base_ = 'resnet56_cifar10_basis-macs36.py'

# trained by resnet56_cifar10_basis-macs36.py; the plan comes with it
load_from = 'work_dirs/resnet56_cifar10_basis-macs36/epoch_120.pth'

custom_hooks = [
    # the distillation of the base, without its planner
    dict(
        type='mmbasis.BasisCompressionHook',
        distillation=_base_.custom_hooks[0].distillation),
    dict(type='mmbasis.QuantizationHook', num_batches=8),
]

# a tenth of the rate of before: the weights are to settle on the grid
optim_wrapper = dict(optimizer=dict(lr=0.001))
param_scheduler = dict(T_max=12)
train_cfg = dict(max_epochs=12)
